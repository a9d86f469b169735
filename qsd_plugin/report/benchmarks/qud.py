"""What QUD adds to a training step: its loss and queue beside the networks, and cached teacher embeddings.

Steps are forward, backward and SGD's update over a synthetic batch that stays in memory; loading images is left out.
Networks: MobileFaceNet as student, IResNet-50 as teacher, without trained weights, which cost the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsd_plugin.core.streams import numpy_stream, torch_stream
from qsd_plugin.data.feature_cache import FeatureCache
from qsd_plugin.data.feature_cache_writer import FeatureCacheWriter
from qsd_plugin.methods.qud import FeatureQueue, qud_loss
from qsd_plugin.networks import iresnet50, mobilefacenet_qud
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, paired_ratio

Step = Callable[[], None]

#: Largest share of loss and queue in a step, and largest ratio of a step with cached embeddings to a student's own.
SHARE_LIMIT, CACHED_LIMIT = 0.01, 1.05
TEMPERATURE = 0.1
#: Queue for the memory, so long that a copy of it stands out, and rows, so few that the logits do not.
MEMORY_QUEUE, MEMORY_ROWS = 65536, 16
#: Images in the cache that rows are read from, at random; they are in the system's page cache.
CACHED_IMAGES = 4096


@dataclass(frozen=True)
class Size:
    """One training problem: rows B, queue entries n, embedding size D, image size in pixels.

    ``network_batch`` images go through the networks at once; where they are fewer than B, the step of B is taken to be
    B / ``network_batch`` times as long.
    """

    batch: int = 512
    queue: int = 1024
    dim: int = 512
    pixels: int = 112
    network_batch: int = 512
    device: str = "cpu"

    def __str__(self) -> str:
        return f"B={self.batch} n={self.queue} D={self.dim} {self.pixels}x{self.pixels} {self.device}"


#: The size that the limits are stated for. A whole batch takes two CPU cores minutes per step.
SIZES = (Size(network_batch=16), Size(device="cuda"))


def run(chosen: Sequence[Size] = SIZES, *, pairs: int = 30, seed: int = 0) -> dict[str, Any]:
    """Time loss and queue, and a step with cached embeddings, at every size.

    Args:
        chosen: Sizes; those on a GPU are skipped where there is none.
        pairs: Interleaved pairs of timings after a warm-up.
        seed: Seeds networks, images and embeddings.

    Returns:
        ``threads``, ``load`` (one-minute average at the start) and ``items``. *Loss and queue*: their time at B over
        that of student and teacher, by :func:`paired_ratio`, with the latter's seconds per image at ``network_batch``
        and at half of it: if the second is larger, a step of B is faster than taken here, and the share higher.
        *Cached*: a student's step on ``network_batch`` images with drawing flips, reading embeddings, loss and queue,
        over one with the cheapest loss there is. *Memory*: the peak of one loss, ``enqueue`` and ``backward`` beyond
        what was there, limited to one copy of the queue.
    """
    load = os.getloadavg()[0]
    # The memory first: what larger work has freed would be used again unseen.
    items = {f"QUD loss and queue, n={MEMORY_QUEUE} D=512, memory": memory(MEMORY_QUEUE, MEMORY_ROWS, 512, seed)}
    for size in chosen:
        if size.device == "cuda" and not torch.cuda.is_available():
            items[f"QUD, {size}"] = {"skipped": "not shown, no GPU"}
            continue
        items[f"QUD loss and queue in a step, {size}"] = _share(size, pairs, seed)
        with tempfile.TemporaryDirectory() as folder:
            cached, plain = cached_steps(size, Path(folder), seed)
            timed = paired_ratio(cached, plain, pairs) | {"limit": CACHED_LIMIT}
        items[f"QUD step with cached teacher, {size} ({size.network_batch} images)"] = timed
    return {"threads": torch.get_num_threads(), "load": load, "items": items}


def loss_step(size: Size, seed: int) -> Step:
    """The loss of B rows, its gradient by the student's embeddings, and the queue's update."""
    student, teacher = (_draw(seed, name, size.batch, size.dim).to(size.device) for name in ("student", "teacher"))
    queue = FeatureQueue(size.queue, size.dim, seed=seed).to(size.device)
    student.requires_grad_(True)

    def step() -> None:
        student.grad = None
        loss = qud_loss(student, teacher, queue.features, TEMPERATURE)
        queue.enqueue(teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        _finished(size)

    return step


def network_step(size: Size, images: int, seed: int) -> Step:
    """Student and teacher on some images, the student's backward pass and update."""
    student_step = _student_step(size, images, seed)
    teacher = iresnet50(size.dim, input_size=size.pixels).to(size.device).eval()
    pixels = _images(size, images, seed)

    def step() -> None:
        with torch.no_grad():
            teacher(pixels)
        student_step(_cheapest_loss)

    return step


def cached_steps(size: Size, folder: Path, seed: int) -> tuple[Step, Step]:
    """A student's step on ``network_batch`` images with the teacher's embeddings from a cache, and one without."""
    cache, rows = _cache(size, folder, seed), numpy_stream(seed, "rows")
    queue = FeatureQueue(size.queue, size.dim, seed=seed).to(size.device)
    own, plain = (_student_step(size, size.network_batch, seed) for _ in range(2))
    draws = iter(range(1 << 62))

    def embeddings() -> Tensor:
        read = []
        for row in rows.integers(len(cache), size=size.network_batch).tolist():
            mirrored = bool(numpy_stream(seed, "flip", 0, next(draws)).random() < 0.5)
            read.append(torch.from_numpy(cache.read(row, mirrored=mirrored)))
        return torch.stack(read).to(size.device, torch.float32)

    def loss(student: Tensor) -> Tensor:
        teacher = embeddings()
        value = qud_loss(student, teacher, queue.features, TEMPERATURE)
        queue.enqueue(teacher)
        return value

    return lambda: own(loss), lambda: plain(_cheapest_loss)


def memory(entries: int, rows: int, dim: int, seed: int) -> dict[str, Any]:
    """Memory that one loss, its gradient and the queue's update take for a moment."""
    loss_step(Size(batch=rows, queue=rows, dim=dim), seed)()  # thread pools and code are there from now on
    step = loss_step(Size(batch=rows, queue=entries, dim=dim), seed)
    return {"extra_memory_mib": extra_memory_mib(step), "memory_limit_mib": entries * dim * 4 / 2**20}


def _share(size: Size, pairs: int, seed: int) -> dict[str, Any]:
    networks, scale = network_step(size, size.network_batch, seed), size.batch / size.network_batch
    timed = paired_ratio(loss_step(size, seed), networks, pairs)
    timed |= {name: timed[name] / scale for name in ("median", "low", "high")}
    per_image = timed["b_seconds"] / size.network_batch
    half = paired_ratio(network_step(size, size.network_batch // 2, seed), networks, max(pairs // 5, 1))
    return timed | {
        "b_seconds": timed["b_seconds"] * scale,
        "limit": SHARE_LIMIT,
        "network_batch": size.network_batch,
        "seconds_per_image": per_image,
        "seconds_per_image_at_half": half["a_seconds"] / (size.network_batch // 2),
    }


def _student_step(size: Size, images: int, seed: int) -> Callable[[Callable[[Tensor], Tensor]], None]:
    torch.manual_seed(seed)
    network: nn.Module = mobilefacenet_qud(size.dim, input_size=size.pixels).to(size.device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    pixels = _images(size, images, seed)

    def step(loss: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        loss(network(pixels)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _finished(size)

    return step


def _cheapest_loss(embedding: Tensor) -> Tensor:
    return embedding.square().mean()


def _cache(size: Size, folder: Path, seed: int) -> FeatureCache:
    keys = [str(number) for number in range(CACHED_IMAGES)]
    writer = FeatureCacheWriter(folder, keys, size.dim, identity={})
    features = _draw(seed, "cached", CACHED_IMAGES, 2 * size.dim).view(CACHED_IMAGES, 2, size.dim)
    writer.write(np.arange(CACHED_IMAGES), features.numpy())
    writer.finish()
    return FeatureCache(folder)


def _images(size: Size, images: int, seed: int) -> Tensor:
    return _draw(seed, "images", images, 3 * size.pixels**2).view(images, 3, size.pixels, size.pixels).to(size.device)


def _draw(seed: int, name: str, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch_stream(seed, name))


def _finished(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()
