"""Features of a frozen encoder, computed once and kept in memory, for probe.py --cache."""
import torch
from tqdm import tqdm

from data import collate
from plumbing import training


class Cached(torch.utils.data.Dataset):
    """The items of `frames` with the encoder's features [N, D], in fp16, in place of its inputs.

    They are computed once.
    """

    def __init__(self, frames, features, workers, device):
        order = training.in_batches(range(len(frames)))
        loader = training.load(frames, order, collate, workers, device)
        self.items = []
        for batch in tqdm(loader, "features", disable=training.rank() > 0, mininterval=2):
            batch = training.to_device(batch, device)
            batch["features"] = features(batch).half()
            self.add(batch)

    def add(self, batch):
        """Cut a batch into its items."""
        counts = torch.bincount(batch["view"].cpu(), minlength=len(batch["condition"])).tolist()
        parts = {name: batch[name].cpu().split(counts)
                 for name in ("features", "pixels", "labels", "depths") if name in batch}
        for number, condition in enumerate(batch["condition"].tolist()):
            item = {name: values[number].clone() for name, values in parts.items()}
            self.items.append({"condition": condition} | item)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key[1]]
