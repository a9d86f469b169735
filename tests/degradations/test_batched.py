"""The batched functions against the one-image functions, at the tolerances that they state."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from qsd_plugin.core.errors import ConfigError, DataError, RegistryError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import apply, batched, names, replay, views
from qsd_plugin.degradations.batched_jpeg import jpeg
from qsd_plugin.degradations.mixing import parse_mix, replay_steps

#: Far more than any tolerance: batches agree because they are degraded alike, not because little happens to them.
VISIBLE = 4.0


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Waves, a ramp, a box and grain."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    waves = 127 + 90 * np.sin(columns / (5 + 3 * seed)) * np.cos(rows / 9)
    image = np.stack([waves, 255 * rows / height, 120 + 80 * np.cos((rows + columns) / 7)], axis=2)
    image[height // 4 : height // 2, width // 3 : 2 * width // 3] = generator.integers(0, 256, 3)
    return np.clip(image + generator.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=[(96, 48), (61, 45)], ids=["even", "odd"])
def pictures(request: pytest.FixtureRequest) -> list[np.ndarray]:
    return [picture(seed, *request.param) for seed in range(6)]


def as_batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def enlarged(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    size = (like.shape[1], like.shape[0])
    return np.asarray(PILImage.fromarray(image).resize(size, PILImage.Resampling.BICUBIC))


def errors(batch: torch.Tensor, images: list[np.ndarray]) -> np.ndarray:
    assert batch.dtype == torch.uint8
    return np.abs(batch.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(images))


@pytest.mark.parametrize("severity", [None, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]])
@pytest.mark.parametrize("name", names())
def test_a_batch_is_its_images_one_by_one(name: str, severity: list[float] | None, pictures: list[np.ndarray]) -> None:
    generator, one = numpy_stream(1, name), numpy_stream(1, name)
    found, params = batched.apply(name, as_batch(pictures), generator, severity)
    expected = []
    for index, image in enumerate(pictures):
        degraded, numbers = apply(name, image, one, None if severity is None else severity[index])
        assert numbers == params[index]
        expected.append(enlarged(degraded, image))
    difference, tolerance = errors(found, expected), batched.TOLERANCES[name]
    assert difference.max() <= tolerance.largest
    assert difference.mean(axis=(1, 2, 3)).max() <= tolerance.mean
    if severity is not None:
        change = np.abs(np.stack(expected).astype(int) - np.stack(pictures)).mean(axis=(1, 2, 3))
        assert change[-1] > VISIBLE
    assert torch.equal(batched.replay(as_batch(pictures), json.loads(json.dumps(params))), found)


def test_every_degradation_has_a_batched_one_and_a_tolerance() -> None:
    from qsd_plugin.degradations.batched_kernels import KERNELS

    assert sorted(KERNELS) == names() == sorted(batched.TOLERANCES)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("quality", [10, 30, 75, 95])
def test_jpeg_is_that_of_libjpeg_but_for_single_levels(quality: int, halved: bool) -> None:
    for size in ((64, 64), (55, 55), (33, 20), (12, 11), (7, 5), (20, 3), (1, 1)):
        image = picture(1, *size)
        packed = io.BytesIO()
        PILImage.fromarray(image).save(packed, format="JPEG", quality=quality, subsampling=2 if halved else 0)
        expected = np.asarray(PILImage.open(packed))
        difference = errors(
            jpeg(as_batch([image]).float(), [quality], halved_chroma=halved).to(torch.uint8), [expected]
        )
        assert np.median(difference) == 0
        assert (difference > 2).mean() < 0.08
        assert difference.mean() < 1.0


def test_images_of_one_batch_do_not_touch_each_other(pictures: list[np.ndarray]) -> None:
    batch = as_batch(pictures)
    for name in names():
        found, params = batched.apply(name, batch, numpy_stream(3), [0.9, 0.3, 0.6, 0.1, 1.0, 0.5])
        alone = batched.replay(batch[2:3], params[2:3])
        assert (found[2:3].int() - alone.int()).abs().max() <= 1


def test_mixes_with_different_steps_for_each_image(pictures: list[np.ndarray]) -> None:
    mix, generator = parse_mix("res+ill+noise+motion_0.6"), numpy_stream(3)
    steps = [mix.draw(generator, *image.shape[:2]) for image in pictures]
    assert len({tuple(step["name"] for step in chain) for chain in steps}) > 3
    found = batched.replay(as_batch(pictures), steps)
    expected = [enlarged(replay_steps(image, chain), image) for image, chain in zip(pictures, steps, strict=True)]
    difference = errors(found, expected)
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.9) <= 6  # the dark end of a gamma curve is steep, motion stretches


def test_an_image_without_steps_stays_as_it_is(pictures: list[np.ndarray]) -> None:
    batch = as_batch(pictures)
    found = batched.replay(batch, [[], [{"name": "darkness", "gain": 0.5, "gamma": 1.0}], [], [], [], []])
    assert torch.equal(found[0], batch[0])
    assert not torch.equal(found[1], batch[1])


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_views_of_a_batch(order: str) -> None:
    faces = [picture(seed, 64, 64) for seed in range(6)]
    options = {"crop_probability": 0.5, "photometric_probability": 0.5, "rotation_probability": 0.5}
    made = [
        views.degraded_view(face, numpy_stream(seed), **options, colour_order=order if seed % 2 else "rgb")
        if seed % 3
        else views.adaface_view(face, numpy_stream(seed), probability=1.0, colour_order=order)
        for seed, face in enumerate(faces)
    ]
    found = batched.replay_views(as_batch(faces), [params for _, params in made])
    difference = errors(found, [view for view, _ in made])
    assert difference.mean(axis=(1, 2, 3)).max() < batched.TOLERANCES["qgface_rescale"].mean
    assert difference.mean() < 0.7
    assert {params["mirrored"] for _, params in made} == {True, False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", names())
def test_a_device_agrees_with_the_cpu(name: str, pictures: list[np.ndarray]) -> None:
    batch = as_batch(pictures)
    on_cpu, params = batched.apply(name, batch, numpy_stream(1, name))
    found = batched.replay(batch.cuda(), params)
    assert found.is_cuda
    difference = (found.cpu().int() - on_cpu.int()).abs().float()
    assert difference.max() <= batched.TOLERANCES[name].largest
    assert difference.mean(dim=(1, 2, 3)).max() <= batched.TOLERANCES[name].mean


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 8, 8), r"torch.float32 tensor of shape \(2, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"torch.uint8 tensor of shape \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"\(2, 8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"\(0, 3, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "'ndarray'"),
    ],
)
def test_what_is_no_batch_is_refused(images: object, found: str) -> None:
    for call in (
        lambda: batched.apply("blur", images, numpy_stream(0)),  # type: ignore[arg-type]
        lambda: batched.replay(images, []),  # type: ignore[arg-type]
        lambda: batched.replay_views(images, []),  # type: ignore[arg-type]
    ):
        with pytest.raises(DataError, match=rf"Batch of images to degrade: got .*{found}.*expected a torch\.uint8"):
            call()


def test_other_bad_input() -> None:
    batch = torch.zeros(2, 3, 9, 9, dtype=torch.uint8)
    with pytest.raises(RegistryError, match=r"Unknown degradation: got 'motionblur'\. Did you mean 'motion_blur'"):
        batched.apply("motionblur", batch, numpy_stream(0))
    with pytest.raises(ConfigError, match=r"Severities of a batch: got 3; expected one number, or one for each of 2"):
        batched.apply("blur", batch, numpy_stream(0), [0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match=r"Severity of degradation 'blur': got 1\.5"):
        batched.apply("blur", batch, numpy_stream(0), [0.1, 1.5])
    with pytest.raises(DataError, match=r"'qgface_rescale': got '9 x 9 pixels'; expected at least 10 pixels"):
        batched.apply("qgface_rescale", batch, numpy_stream(0))
    with pytest.raises(DataError, match=r"'dil_motion': got '7 x 9 pixels'"):
        batched.replay(batch[:1, :, :7], [{"name": "dil_motion", "length": 5, "angle": 0.0}])
    with pytest.raises(DataError, match=r"Parameters of a batch: got 1; expected one entry for each of 2 images"):
        batched.replay(batch, [{"name": "blur", "sigma": 1.0}])
    with pytest.raises(DataError, match="Parameters of a batch: got 1"):
        batched.replay_views(batch, [{"steps": [], "mirrored": False, "colour_order": "rgb"}])
    with pytest.raises(DataError, match="Parameters of a view"):
        batched.replay_views(batch, [{"steps": []}, {}])


@pytest.mark.parametrize("name", names())
def test_replay_refuses_parameters_that_are_not_a_draw(name: str) -> None:
    batch = torch.full((1, 3, 16, 16), 9, dtype=torch.uint8)
    _, [params] = batched.apply(name, batch, numpy_stream(0), 0.5)
    missing = next(key for key in params if key not in ("name", "severity"))
    for broken in ({**params, "extra": 1}, {key: value for key, value in params.items() if key != missing}):
        with pytest.raises(DataError, match=r"Parameters of a degradation: got \{.*that apply\(\) returned"):
            batched.replay(batch, [broken])
        with pytest.raises(DataError, match=r"Parameters of a degradation: got \{.*that apply\(\) returned"):
            replay(np.full((16, 16, 3), 9, dtype=np.uint8), broken)
