"""The stand-in image encoder: a masked autoencoder on day-clear frames, without labels (He et al., CVPR 2022).

    python miniature/world.py --out data/pretrain --seed 1000 --train 700 0 0 --val 0 --frames 3
    python miniature/pretrain.py --data data/pretrain --out miniature/encoder.pth

What DINOv2 is for the paper, a network that has seen clear days only, this one is for the miniature world. At the end the
tokens' mean and standard deviation go into the last LayerNorm's affine: the tokens of a masked autoencoder share one large
mean, and the cosine distance would see little else. --out is read by every --encoder flag.
"""
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import training
from plumbing.arguments import COUNT, POSITIVE, SEED, Parser, real
from data import read_image
from errors import InputError, one_line_errors
from index import load_index
from models import ENCODERS, ImageEncoder
from run_folder import save
from vit import Block, ViT


def patches_of(images, patch):
    """Images [B, 3, H, W] to patches [B, T, 3 patch^2], row by row."""
    B = len(images)
    x = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, h, w, patch, patch]
    return x.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, 3 * patch * patch)


def correlation(tokens):
    """Sum of the squared correlations of each of the features [N, D] with the others, mean over the features."""
    tokens = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-4)
    matrix = tokens.T @ tokens / len(tokens)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / len(matrix)


class MaskedAutoencoder(nn.Module):
    """The encoder sees part of the patches; a decoder of one block predicts the others' pixels.

    A penalty on the features' correlations (as VICReg's covariance term, Bardes et al., ICLR 2022) keeps the tokens of so small
    a network from collapsing to some ten directions, in which a cosine distance has little to say about classes.
    """

    def __init__(self, encoder, patch_size, masked, raw, decorrelate):
        super().__init__()
        self.encoder, self.patch, self.masked, self.raw, self.decorrelate = encoder, patch_size, masked, raw, decorrelate
        dim, tokens = encoder.pos_embed.shape[2], encoder.pos_embed.shape[1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.decoder = Block(dim, 4, 3 * dim)
        self.predict = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * patch_size**2))

    def forward(self, images):
        """Normalised images [B, 3, H, W] -> mean squared error on the masked patches + weighted correlation of the features."""
        tokens = self.encoder.embed(images)  # [B, 1 + T, D]
        B, T, D = tokens.shape[0], tokens.shape[1] - 1, tokens.shape[2]
        order = torch.rand(B, T).argsort(1)
        seen, hidden = order.split([T - round(self.masked * T), round(self.masked * T)], 1)

        def at(values, places):
            return values.gather(1, places.unsqueeze(2).expand(-1, -1, values.shape[2]))
        x = torch.cat([tokens[:, :1], at(tokens[:, 1:], seen)], 1)
        for block in self.encoder.blocks:
            x = block(x)
        x = self.encoder.norm(x)
        features = x[:, 1:].flatten(0, 1)  # [N, D]
        full = self.mask_token.expand(B, T, D).scatter(1, seen.unsqueeze(2).expand(-1, -1, D), x[:, 1:])
        x = self.decoder(torch.cat([x[:, :1], full], 1) + self.positions)[:, 1:]
        target = patches_of(images, self.patch)
        mean, std = target.mean(2, keepdim=True), target.std(2, keepdim=True)
        target = (1 - self.raw) * (target - mean) / (std + 0.02) + self.raw * target
        error = ((self.predict(at(x, hidden)) - at(target, hidden)) ** 2).mean()
        return error + self.decorrelate * correlation(features)


@torch.no_grad()
def standardise(vit, images):
    """Set the last LayerNorm's affine so that patch tokens over `images` have mean 0 and standard deviation 1."""
    nn.init.ones_(vit.norm.weight), nn.init.zeros_(vit.norm.bias)
    tokens = torch.cat([vit.feature_map(batch, "norm").flatten(2).transpose(1, 2).flatten(0, 1) for batch in images.split(64)])
    vit.norm.weight.copy_(1 / tokens.std(0))
    vit.norm.bias.copy_(-tokens.mean(0) / tokens.std(0))


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/pretrain", help="miniature world; its day-clear training frames are used (default: %(default)s)")
    add("--out", default="miniature/encoder.pth", help="checkpoint to write (default: %(default)s)")
    add("--name", default="vit_mini8", choices=[n for n, row in ENCODERS.items() if row.source == "built-in"])
    add("--image-size", type=COUNT, nargs=2, default=[80, 160], metavar=("H", "W"), help="(default: 80 160)")
    add("--epochs", type=COUNT, default=30, help="(default: %(default)s)")
    add("--batch", type=COUNT, default=32, help="images in a batch (default: %(default)s)")
    add("--lr", type=POSITIVE, default=1.5e-3, help="peak learning rate of AdamW, weight decay 0.05 (default: %(default)s)")
    add("--masked", type=real(above=0, below=1), default=0.7, help="part of the patches that is hidden (default: %(default)s)")
    add("--raw", type=real(0, 1), default=0.3, help="part of the raw patch in the target, the rest is normalised (default: %(default)s)")
    add("--decorrelate", type=real(0), default=0.1, help="weight of the features' correlations in the loss (default: %(default)s)")
    add("--jitter", type=real(0, below=1), default=0.2, help="range of brightness and contrast factors around 1 (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    begin = time.time()

    # ---- data: all images in memory ----
    index = load_index(args.data, look=False)
    rows = index.select("train", ["day-clear"])
    paths = [Path(index.root, name.decode()) for name in index.image[rows].flatten()]
    with ThreadPoolExecutor(2) as pool:
        images = torch.stack(list(pool.map(lambda p: torch.from_numpy(read_image(p, args.image_size)), paths)))

    if len(images) < args.batch:
        raise InputError(f"--batch {args.batch}: {args.data} has only {len(images)} day-clear training images")

    # ---- model ----
    row = ENCODERS[args.name]
    vit = ViT(row.patch_size, **row.vit)
    encoder = ImageEncoder(vit, {"name": args.name, "feature": "norm", "image_size": tuple(args.image_size)})
    encoder.check_size(args.image_size)
    hidden = round(args.masked * (vit.pos_embed.shape[1] - 1))
    if not 0 < hidden < vit.pos_embed.shape[1] - 1:
        raise InputError(f"--masked {args.masked:g}: hides {hidden} of {vit.pos_embed.shape[1] - 1} patches; some, but not all, must be hidden")
    model = MaskedAutoencoder(vit, row.patch_size, args.masked, args.raw, args.decorrelate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.95))
    total = len(images) // args.batch * args.epochs

    # ---- loop ----
    bar = trange(total, desc="pretrain", mininterval=2)
    for step in bar:
        if step % (len(images) // args.batch) == 0:
            order = torch.randperm(len(images)).split(args.batch)
        for group in optimizer.param_groups:
            group["lr"] = training.cosine(step, total, args.lr, 0.0, round(0.08 * total))
        batch = images[order[step % (len(images) // args.batch)]].float() / 255
        flipped = torch.rand(len(batch), 1, 1, 1) < 0.5
        batch = torch.where(flipped, batch.flip(3), batch)
        contrast, brightness = 1 + args.jitter * (2 * torch.rand(2, len(batch), 1, 1, 1) - 1)
        mean = batch.mean((1, 2, 3), keepdim=True)
        batch = (((batch - mean) * contrast + mean) * brightness).clamp(0, 1)
        loss = model((batch - encoder.mean) / encoder.std)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    standardise(vit, ((images[:1000].float() / 255) - encoder.mean) / encoder.std)
    save(args.out, {"kind": "image_encoder", "encoder": encoder.spec, "model": vit.state_dict(), "step": total, "total": total,
                    "made_from": {"frames": index.fingerprint(rows)}, "args": vars(args)})
    print(f"{args.out}: {len(images)} images, {total} steps, last loss {loss.item():.3f}, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
