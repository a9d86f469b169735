"""Records and folders, prefetched by a thread onto a CUDA stream."""

import os
import queue as Queue
import threading

import mxnet as mx
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from utils.utils_distributed_sampler import DistributedSampler

NORMALISE = [
    transforms.RandomHorizontalFlip(),
    transforms.ToTensor(),
    transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
]


def get_dataloader(root_dir, local_rank, batch_size, dali=False, dali_aug=False, seed=2048, num_workers=2):
    if os.path.exists(os.path.join(root_dir, "train.rec")):
        train_set = MXFaceDataset(root_dir=root_dir, local_rank=local_rank)
    else:
        train_set = ImageFolder(root_dir, transforms.Compose(NORMALISE))
    return DataLoaderX(
        local_rank=local_rank,
        dataset=train_set,
        batch_size=batch_size,
        sampler=DistributedSampler(train_set, seed=seed),
        num_workers=num_workers,
        drop_last=True,
    )


class BackgroundGenerator(threading.Thread):
    def __init__(self, generator, local_rank, max_prefetch=6):
        super(BackgroundGenerator, self).__init__()  # noqa: UP008
        self.queue = Queue.Queue(max_prefetch)
        self.generator, self.local_rank, self.daemon = generator, local_rank, True
        self.start()

    def run(self):
        torch.cuda.set_device(self.local_rank)
        for item in self.generator:
            self.queue.put(item)
        self.queue.put(None)

    def next(self):
        item = self.queue.get()
        if item is None:
            raise StopIteration
        return item

    def __next__(self):
        return self.next()

    def __iter__(self):
        return self


class DataLoaderX(DataLoader):
    def __init__(self, local_rank, **kwargs):
        super(DataLoaderX, self).__init__(**kwargs)  # noqa: UP008
        self.stream = torch.cuda.Stream(local_rank)
        self.local_rank = local_rank

    def __iter__(self):
        self.iter = BackgroundGenerator(super().__iter__(), self.local_rank)
        self.preload()
        return self

    def preload(self):
        self.batch = next(self.iter, None)
        if self.batch is not None:
            with torch.cuda.stream(self.stream):
                self.batch = [part.to(device=self.local_rank, non_blocking=True) for part in self.batch]

    def __next__(self):
        torch.cuda.current_stream().wait_stream(self.stream)
        batch = self.batch
        if batch is None:
            raise StopIteration
        self.preload()
        return batch


class MXFaceDataset(Dataset):
    def __init__(self, root_dir, local_rank):
        super(MXFaceDataset, self).__init__()  # noqa: UP008
        self.transform = transforms.Compose([transforms.ToPILImage(), *NORMALISE])
        self.root_dir = root_dir
        paths = [os.path.join(root_dir, name) for name in ("train.idx", "train.rec")]
        self.imgrec = mx.recordio.MXIndexedRecordIO(*paths, "r")
        header, _ = mx.recordio.unpack(self.imgrec.read_idx(0))
        self.imgidx = np.arange(1, int(header.label[0])) if header.flag > 0 else np.array(list(self.imgrec.keys))

    def __getitem__(self, index):
        header, img = mx.recordio.unpack(self.imgrec.read_idx(self.imgidx[index]))
        label = header.label if isinstance(header.label, float) else header.label[0]
        return self.transform(mx.image.imdecode(img).asnumpy()), torch.tensor(label, dtype=torch.long)

    def __len__(self):
        return len(self.imgidx)
