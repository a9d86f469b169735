"""Ten folds in the host's way: a bare pickle, and SciPy's interpolation where rates repeat."""

import pickle

import mxnet as mx
import numpy as np
import torch
from mxnet import ndarray as nd
from scipy import interpolate


@torch.no_grad()
def load_bin(path, image_size):
    with open(path, "rb") as f:
        bins, issame_list = pickle.load(f)
    data_list = [torch.empty((len(bins), 3, *image_size)) for _ in range(2)]
    for index, content in enumerate(bins):
        img = mx.image.imdecode(content)
        if img.shape[1] != image_size[0]:
            img = mx.image.resize_short(img, image_size[0])
        img = nd.transpose(img, axes=(2, 0, 1))
        data_list[0][index] = torch.from_numpy(img.asnumpy())
        data_list[1][index] = torch.from_numpy(mx.ndarray.flip(data=img, axis=2).asnumpy())
    return data_list, issame_list


def far_threshold(far, thresholds, target):
    return interpolate.interp1d(far, thresholds, kind="slinear")(target)


@torch.no_grad()
def test(data_set, backbone, batch_size, nfolds=10):  # noqa: PT028 - the name is the host's
    data, same = data_set[0], np.asarray(data_set[1])
    parts = [torch.cat([backbone((part / 255 - 0.5) / 0.5) for part in view.split(batch_size)]) for view in data]
    rows = torch.nn.functional.normalize(parts[0] + parts[1]).cpu().numpy()
    distance = np.square(rows[0::2] - rows[1::2]).sum(1)
    thresholds = np.arange(0, 4, 0.001)
    far_threshold(np.array([(distance[~same] < t).mean() for t in thresholds]), thresholds, 1e-3)
    accuracy = max(float(((distance < t) == same).mean()) for t in thresholds)
    return 0.0, 0.0, accuracy, 0.0, float(np.linalg.norm(parts[0].cpu().numpy(), axis=1).mean()), parts
