"""The stand-in image encoder: a masked autoencoder on day-clear frames, without labels.

    python miniature/world.py --out data/pretrain --seed 1000 --train 700 0 0 --val 0 --frames 3
    python miniature/pretrain.py --data data/pretrain --out miniature/encoder.pth

What DINOv2 is for the paper, a network that has seen clear days only, this one is for the miniature
world (masked autoencoders: He et al., CVPR 2022). At the end the last LayerNorm's affine takes the
tokens' mean and standard deviation away: the tokens of a masked autoencoder share one large mean,
and the cosine distance would see little else. Every --encoder flag reads --out.
"""
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import select
from models import ENCODERS, ImageEncoder
from plumbing import training
from plumbing.arguments import COUNT, POSITIVE, SEED, Parser, real
from plumbing.atomic import save
from plumbing.errors import InputError, one_line_errors
from plumbing.fingerprint import of_frames
from readers.files import read_image
from readers.table import open_tables
from vit import Block, ViT


def parse(argv=None):
    parser = Parser(__doc__)
    built_in = [name for name, row in ENCODERS.items() if row.source == "built-in"]
    add = parser.add_argument
    add("--data", default="data/pretrain",
        help="miniature world; its day-clear training frames are used (default: %(default)s)")
    add("--out", default="miniature/encoder.pth",
        help="checkpoint to write (default: %(default)s)")
    add("--name", default="vit_mini8", choices=built_in, help="network (default: %(default)s)")
    add("--image-size", type=COUNT, nargs=2, default=[80, 160], metavar=("H", "W"),
        help="pixels (default: 80 160)")
    add("--epochs", type=COUNT, default=30, help="(default: %(default)s)")
    add("--batch", type=COUNT, default=32, help="images in a batch (default: %(default)s)")
    add("--lr", type=POSITIVE, default=1.5e-3,
        help="peak learning rate of AdamW, weight decay 0.05 (default: %(default)s)")
    add("--masked", type=real(above=0, below=1), default=0.7,
        help="part of the patches that is hidden (default: %(default)s)")
    add("--raw", type=real(0, 1), default=0.3,
        help="part of the raw patch in the target, the rest is normalised (default: %(default)s)")
    add("--decorrelate", type=real(0), default=0.1,
        help="weight of the features' correlations in the loss (default: %(default)s)")
    add("--jitter", type=real(0, below=1), default=0.2,
        help="range of brightness and contrast factors around 1 (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="(default: %(default)s)")
    return parser.parse_args(argv)


# ---- maths ---------------------------------------------------------------------------------------
def patches_of(images, patch):
    """Images [B, 3, H, W] to patches [B, T, 3 patch^2], row by row."""
    B = len(images)
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, h, w, patch, patch]
    return x.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, 3 * patch * patch)


def tokens_at(tokens, places):
    """The tokens [B, T, D] at places [B, S]: [B, S, D]."""
    return tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def correlation(tokens):
    """How much the features of tokens [N, D] correlate: a scalar from 0 to D - 1.

    It is the sum of a feature's squared correlations with the others, mean over the features.
    """
    tokens = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-4)
    matrix = tokens.T @ tokens / len(tokens)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / len(matrix)


def jittered(images, jitter):
    """Images [B, 3, H, W] in [0, 1], half of them flipped, of another contrast and brightness."""
    flipped = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(flipped, images.flip(3), images)
    contrast, brightness = 1 + jitter * (2 * torch.rand(2, len(images), 1, 1, 1) - 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (((images - mean) * contrast + mean) * brightness).clamp(0, 1)


class MaskedAutoencoder(nn.Module):
    """The encoder sees part of the patches; a decoder of one block predicts the others' pixels.

    A penalty on the features' correlations (as VICReg's covariance term, Bardes et al., ICLR 2022)
    keeps the tokens of so small a network from collapsing to some ten directions, in which a cosine
    distance has little to say about classes.

    masked: part of the patches that is hidden; raw: part of the raw patch in the target;
    decorrelate: weight of the penalty.
    """

    def __init__(self, encoder, patch_size, masked, raw, decorrelate):
        super().__init__()
        self.encoder, self.patch = encoder, patch_size
        self.masked, self.raw, self.decorrelate = masked, raw, decorrelate
        _, tokens, dim = encoder.pos_embed.shape
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.decoder = Block(dim, 4, 3 * dim)
        self.predict = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * patch_size**2))

    def forward(self, images):
        """Normalised images [B, 3, H, W] to the loss, a scalar.

        It is the mean squared error on the masked patches plus the weighted penalty.
        """
        # encode the patches that are seen
        tokens = self.encoder.embed(images)  # [B, 1 + T, D]
        B, T, D = tokens.shape[0], tokens.shape[1] - 1, tokens.shape[2]
        hidden_count = round(self.masked * T)
        order = torch.rand(B, T).argsort(1)
        seen, hidden = order.split([T - hidden_count, hidden_count], 1)
        x = torch.cat([tokens[:, :1], tokens_at(tokens[:, 1:], seen)], 1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder.norm(x)
        features = x[:, 1:].flatten(0, 1)  # [N, D]

        # decode them together with mask tokens at the hidden places
        places = seen.unsqueeze(2).expand(-1, -1, D)
        full = self.mask_token.expand(B, T, D).scatter(1, places, x[:, 1:])
        x = self.decoder(torch.cat([x[:, :1], full], 1) + self.positions)[:, 1:]

        target = patches_of(images, self.patch)
        mean, std = target.mean(2, keepdim=True), target.std(2, keepdim=True)
        target = (1 - self.raw) * (target - mean) / (std + 0.02) + self.raw * target
        error = ((self.predict(tokens_at(x, hidden)) - tokens_at(target, hidden)) ** 2).mean()
        return error + self.decorrelate * correlation(features)


@torch.no_grad()
def standardise(vit, images):
    """Set the last LayerNorm's affine.

    After it, the patch tokens over `images` have mean 0 and standard deviation 1.
    """
    nn.init.ones_(vit.norm.weight)
    nn.init.zeros_(vit.norm.bias)
    maps = [vit.feature_map(batch, "norm") for batch in images.split(64)]  # [B, D, h, w]
    tokens = torch.cat([m.flatten(2).transpose(1, 2).flatten(0, 1) for m in maps])  # [N, D]
    vit.norm.weight.copy_(1 / tokens.std(0))
    vit.norm.bias.copy_(-tokens.mean(0) / tokens.std(0))


@one_line_errors
def main(argv=None):
    args = parse(argv)
    torch.manual_seed(args.seed)
    begin = time.time()

    # ---- data: all images in memory ----
    tables = select(open_tables(args.data, look=False), "train", ["day-clear"])
    paths = []
    for table in tables:
        paths += [Path(table.root, name.decode()) for name in table["image"][table.rows].flatten()]

    def read(path):
        return read_image(path, args.image_size)
    with ThreadPoolExecutor(2) as pool:
        images = torch.stack(list(pool.map(read, paths)))
    count = len(images)
    if count < args.batch:
        raise InputError(f"--batch {args.batch}: {args.data} has only {count} day-clear training "
                         "images")

    # ---- model ----
    row = ENCODERS[args.name]
    vit = ViT(row.patch_size, **row.arguments)
    spec = {"name": args.name, "feature": "norm", "image_size": tuple(args.image_size)}
    encoder = ImageEncoder(vit, spec)
    encoder.check_size(args.image_size)
    patches = vit.pos_embed.shape[1] - 1
    hidden = round(args.masked * patches)
    if not 0 < hidden < patches:
        raise InputError(f"--masked {args.masked:g}: hides {hidden} of {patches} patches; "
                         "some, but not all, must be hidden")
    model = MaskedAutoencoder(vit, row.patch_size, args.masked, args.raw, args.decorrelate)

    # ---- optimizer ----
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05,
                                  betas=(0.9, 0.95))
    steps_per_epoch = count // args.batch
    total = steps_per_epoch * args.epochs
    warmup = round(0.08 * total)

    # ---- loop ----
    bar = trange(total, desc="pretrain", mininterval=2)
    for step in bar:
        if step % steps_per_epoch == 0:
            order = torch.randperm(count).split(args.batch)
        for group in optimizer.param_groups:
            group["lr"] = training.cosine(step, total, args.lr, 0.0, warmup)
        batch = images[order[step % steps_per_epoch]].float() / 255
        batch = jittered(batch, args.jitter)
        loss = model((batch - encoder.mean) / encoder.std)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    # ---- save ----
    standardise(vit, (images[:1000].float() / 255 - encoder.mean) / encoder.std)
    save(args.out, {
        "kind": "image_encoder", "encoder": encoder.spec, "model": vit.state_dict(),
        "step": total, "total": total, "made_from": {"frames": of_frames(tables)},
        "args": vars(args)})
    seconds = time.time() - begin
    print(f"{args.out}: {count} images, {total} steps, last loss {loss.item():.3f}, "
          f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
