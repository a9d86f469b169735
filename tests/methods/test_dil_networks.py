"""DIL's networks: recorded outputs, the paper's sizes, small versions, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dil_recorded import NUM_CLASSES, Golden, close, fill, image, recorded, same_digest, same_digests
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import (
    ClassBlock,
    ContentEncoder,
    DegradationAttention,
    DegradationEncoder,
    Generator,
    IdentityEncoder,
    MultiScaleDiscriminator,
)
from qsd_plugin.methods.dil.adam import FlatAdam
from qsd_plugin.methods.dil.layers import LayerNorm, LiteBlock, adaptive_instance_norm
from qsd_plugin.methods.dil.losses import rank_loss
from qsd_plugin.networks.resnet_stages import ResNetStages

FULL = (256, 128)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return recorded("networks")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return image("fwd", 2, FULL)


@pytest.fixture(scope="module")
def content_encoder() -> ContentEncoder:
    return fill(ContentEncoder(NUM_CLASSES), "E_con").eval()


@pytest.fixture(scope="module")
@torch.no_grad()
def taken_apart(content_encoder: ContentEncoder, images: Tensor) -> dict[str, Any]:
    maps = content_encoder.maps(images, trunk_grad=False)
    encoded = content_encoder.read(maps)
    degradation = fill(DegradationEncoder(), "E_deg")
    return {
        "maps": maps,
        "identity": encoded.identity,
        "content": encoded.content,
        "real": degradation(images),
        "syn": degradation(images, "syn"),
    }


@torch.no_grad()
def test_encoders(golden: Golden, content_encoder: ContentEncoder, taken_apart: dict[str, Any]) -> None:
    for stage, features in enumerate(taken_apart["maps"]):
        same_digest(features, golden[f"E_con.stage{stage}.digest"])
    same_digest(content_encoder.head.aspp(taken_apart["maps"][0]), golden["E_con.aspp.digest"])
    close(taken_apart["identity"], golden["E_con.f"])
    same_digest(taken_apart["content"], golden["E_con.c.digest"])
    close(content_encoder.classifier.embed(taken_apart["identity"]), golden["E_con.add_block"])
    close(content_encoder.classifier(taken_apart["identity"]), golden["E_con.classifier"])
    close(taken_apart["real"], golden["E_deg.real"])
    close(taken_apart["syn"], golden["E_deg.syn"])


@torch.no_grad()
def test_generator(golden: Golden, taken_apart: dict[str, Any]) -> None:
    generator, content, codes = fill(Generator(), "G"), taken_apart["content"], taken_apart["real"]
    scales, shifts = generator.styles(codes)
    close(scales, golden["G.adain_w"])
    close(shifts, golden["G.adain_b"])
    same_digest(generator(content, codes), golden["G.img.digest"])
    of_the_batch = fill(Generator(ln_scope="batch"), "G")
    same_digest(of_the_batch(content, codes), golden["G.img_batch_global_LN.digest"])


@torch.no_grad()
def test_discriminators(golden: Golden, images: Tensor) -> None:
    close(fill(MultiScaleDiscriminator(1), "D_deg")(images)[0], golden["D_deg.out0"])
    for scale, scores in enumerate(fill(MultiScaleDiscriminator(3), "D_real")(images)):
        close(scores, golden[f"D_real.out{scale}"])


@torch.no_grad()
def test_teacher_and_attention(golden: Golden, images: Tensor, taken_apart: dict[str, Any]) -> None:
    teacher = fill(IdentityEncoder(NUM_CLASSES), "E_id").eval()
    features = teacher(images)
    close(features, golden["E_id.f"])
    close(teacher.classifier.embed(features), golden["E_id.add_block"])
    close(teacher.classifier(features), golden["E_id.classifier"])
    joined = torch.cat([features, taken_apart["identity"]], dim=1)
    close(fill(ClassBlock(4096, NUM_CLASSES), "C").eval()(joined), golden["C"])
    attention = fill(DegradationAttention(), "A_deg").eval()
    close(attention(features), golden["A_deg.no_f_d"])
    close(attention(features), golden["A_deg.with_f_d.rand>=0.5"])
    close(attention(features, taken_apart["real"]), golden["A_deg.with_f_d.rand<0.5"])


@torch.no_grad()
def test_content_encoder_in_training(golden: Golden, images: Tensor) -> None:
    encoder = fill(ContentEncoder(NUM_CLASSES), "E_con")
    identity, content = encoder(images)
    close(identity, golden["E_con.train.f"])
    same_digest(content, golden["E_con.train.c.digest"])
    state = encoder.state_dict()
    watched = {name: state[name] for name in golden["E_con.train.running/names"].tolist()}
    same_digests(watched, golden, "E_con.train.running")


def test_layer_norm(golden: Golden) -> None:
    norm = fill(Generator(), "G").dec.up[0].conv.norm
    x = torch.from_numpy(golden["LayerNorm.in"])
    close(norm(x), golden["LayerNorm.out"])
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]), rtol=0, atol=1e-14)
    norm.scope = "batch"
    assert (norm(x)[:1] - norm(x[:1])).abs().max() > 1e-3


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_layer_norm_is_its_equation_with_any_precision(scope: str) -> None:
    norm = LayerNorm(6, scope=scope)
    x = 3 * torch.randn(4, 6, 5, 3, generator=torch_stream(1)) + 100
    parts = [x] if scope == "batch" else x.split(1)
    expected = torch.cat([(part - part.mean()) / (part.std() + 1e-5) for part in parts])
    expected = norm.gamma[:, None, None] * expected
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        island = norm(x.bfloat16())
    assert island.dtype == torch.float32
    torch.testing.assert_close(island, norm(x.bfloat16().float()))


def test_adaptive_norm_is_its_equation() -> None:
    x, scale, shift = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 5), (2, 3), (2, 3)))
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    expected = scale[:, :, None, None] * (x - mean) / (variance + 1e-5).sqrt() + shift[:, :, None, None]
    torch.testing.assert_close(adaptive_instance_norm(x, scale, shift), expected)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, scale, shift))
    assert torch.autograd.gradcheck(adaptive_instance_norm, inputs)


def test_lite_block_is_padded_by_reflection_in_front_of_the_depthwise_convolution() -> None:
    block = LiteBlock(4).eval()
    x = torch.randn(2, 4, 5, 3, generator=torch_stream(2))
    inner = x
    for part in block.model:
        padded = nn.functional.pad(part.conv_1x1(inner), (1, 1, 1, 1), mode="reflect")
        inner = part.norm(nn.functional.conv2d(padded, part.conv_dw.weight, part.conv_dw.bias, groups=4))
        inner = inner.relu() if part is block.model[0] else inner
    torch.testing.assert_close(block(x), (x + inner).relu())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_paper_s_sizes() -> None:
    """Numbers of parameters with the 1367 identities of MLR-CUHK03."""
    encoder = ContentEncoder(1367)
    assert parameters(encoder) == 23_930_743
    assert parameters(encoder.model) == 8_543_296
    assert parameters(encoder.head) == 13_636_064
    assert parameters(encoder.head.aspp) == 52_576
    assert [parameters(block) for block in encoder.head.invariance] == [36_096, 137_728, 537_600, 2_123_776]
    assert [parameters(block) for block in encoder.head.content] == [73_920, 147_648, 295_104, 590_016, 32_896]
    assert [parameters(block) for block in encoder.head.identity] == [72_192, 275_456, 1_075_200, 4_247_552, 3_938_304]
    assert parameters(encoder.classifier) == 1_751_383
    assert len(encoder.state_dict()) == 536
    assert parameters(DegradationEncoder()) == 1_653_696
    generator = Generator()
    assert parameters(generator) == 5_135_811
    assert [parameters(part) for part in generator.dec.children()] == [1_180_672, 256_288, 18_595]
    assert parameters(MultiScaleDiscriminator(1)) == 341_697
    assert parameters(MultiScaleDiscriminator()) == 1_025_091
    teacher = IdentityEncoder(1367)
    assert parameters(teacher.model.layer4) == 14_964_736
    assert parameters(teacher.classifier) == 1_751_383
    assert parameters(ClassBlock(4096, 1367)) == 2_799_959
    assert parameters(DegradationAttention()) == 903_168


def small_encoder(**options: Any) -> ContentEncoder:
    trunk = ResNetStages(blocks=(1, 1, 1), block="basic", width=8)
    return ContentEncoder(5, trunk=trunk, content_dim=16, identity_dim=24, branch=4, scale_dim=8, **options)


def test_small_networks_and_shapes() -> None:
    x = torch.randn(3, 3, 96, 48, generator=torch_stream(3))
    encoder = small_encoder(embedding_dim=12)
    identity, content = encoder(x)
    assert identity.shape == (3, 24)
    assert content.shape == (3, 16, 24, 12)
    assert encoder.classifier.embed(identity).shape == (3, 12)
    assert encoder.classifier(identity).shape == (3, 5)
    codes = DegradationEncoder(code_dim=6, width=4)(x)
    assert codes.shape == (3, 6)
    generator = Generator(content_dim=16, code_dim=6, hidden=10, blocks=2)
    assert generator(content, codes).shape == x.shape
    assert [tuple(scores.shape) for scores in MultiScaleDiscriminator(2, width=4)(x)] == [(3, 1, 24, 12), (3, 1, 12, 6)]


def test_content_and_identity_alone() -> None:
    encoder = small_encoder()
    x = torch.randn(2, 3, 64, 32, generator=torch_stream(4))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    content_only = encoder(x, want_identity=False)
    assert content_only.identity is None
    after = encoder.state_dict()
    moved = {name.split(".")[1] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"content", "invariance"} <= moved
    assert "identity" not in moved
    assert encoder(x, want_content=False).content is None


def test_gradient_stops_at_the_trunk_unless_asked_for() -> None:
    encoder = small_encoder()
    x = torch.randn(2, 3, 64, 32, generator=torch_stream(5)).requires_grad_()
    encoder(x).content.square().sum().backward()
    assert x.grad is None
    assert all(parameter.grad is None for parameter in encoder.model.parameters())
    assert encoder.head.aspp.fuse.conv.weight.grad is not None
    encoder(x, trunk_grad=True).content.square().sum().backward()
    assert x.grad is not None
    assert encoder.model.conv1.weight.grad is not None
    with torch.no_grad():
        assert not encoder(x, trunk_grad=True).content.requires_grad


def test_every_parameter_of_a_network_gets_a_gradient() -> None:
    """In float64 and away from special points; biases in front of an instance norm have a gradient of zero."""
    x = torch.randn(2, 3, 64, 32, generator=torch_stream(6))
    encoder, degradation = small_encoder(), DegradationEncoder(code_dim=6, width=4)
    generator = Generator(content_dim=16, code_dim=6, hidden=10, blocks=2)
    identity, content = encoder(x, trunk_grad=True)
    rendered = generator(content, degradation(x) + degradation(x, "syn"))
    scores = sum(part.mean() for part in MultiScaleDiscriminator(2, width=4)(rendered))
    (scores + encoder.classifier(identity).square().sum()).backward()
    for module in (encoder, degradation, generator):
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_code_changes_the_image_and_not_its_batch_mates() -> None:
    generator = Generator(content_dim=16, code_dim=6, hidden=10)
    content, codes = (torch.randn(*shape, generator=torch_stream(7)) for shape in ((3, 16, 8, 4), (3, 6)))
    plain = generator(content, codes)
    changed = generator(content, torch.cat([codes[:1] + 1, codes[1:]]))
    assert (plain[0] - changed[0]).abs().max() > 1e-3
    assert torch.equal(plain[1:], changed[1:])


@pytest.mark.parametrize(("width", "std"), [(32, 0.02), (8, 0.04), (2, 0.08)])
def test_narrow_discriminators_start_at_the_scale_of_the_authors(width: int, std: float) -> None:
    torch.manual_seed(0)
    weights = [m.weight for m in MultiScaleDiscriminator(1, width=width).modules() if isinstance(m, nn.Conv2d)]
    assert torch.cat([weight.flatten() for weight in weights]).std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("std", "learns"), [(None, True), (0.02, False)])
def test_a_narrow_discriminator_learns_which_image_is_blurred(std: float | None, learns: bool) -> None:
    """With the authors' deviation at a quarter of their width, the control, weight decay wins and the loss stays 1."""
    torch.manual_seed(0)
    network = MultiScaleDiscriminator(1, width=8)
    for module in network.modules():
        if std is not None and isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
    parameters = list(network.parameters())
    adam = FlatAdam(sum(parameter.numel() for parameter in parameters), lr=5e-4)
    for step in range(100):
        image = torch.randn(4, 3, 32, 32, generator=torch_stream(8, step))
        loss = rank_loss(network(nn.functional.avg_pool2d(image, 3, 1, 1)), network(image))
        adam.step(parameters, torch.autograd.grad(loss, parameters))
    assert loss.item() < 0.05 if learns else loss.item() > 0.99


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"DIL image size: got \(64, 40\); expected multiples of 16, at least 20"):
        small_encoder()(torch.zeros(1, 3, 64, 40))
    with pytest.raises(ConfigError, match=r"DIL trunk: channels.*Give the trunk an attribute channels"):
        ContentEncoder(5, trunk=nn.Conv2d(3, 4, 3))
    with pytest.raises(ConfigError, match="DIL degradation head: got 'fake'; expected 'real' or 'syn'"):
        DegradationEncoder(width=4)(torch.zeros(1, 3, 64, 32), "fake")
    with pytest.raises(ConfigError, match="DIL content_dim: got 18; expected a multiple of 4"):
        Generator(content_dim=18)
    with pytest.raises(ConfigError, match=r"ln_scope: got 'sampel'.*Did you mean 'sample'"):
        Generator(ln_scope="sampel")
    with pytest.raises(ConfigError, match="DIL discriminator scales: got 0"):
        MultiScaleDiscriminator(0)
    with pytest.raises(ConfigError, match=r"of 3 scales: image size: got \(64, 16\); expected more than 16"):
        MultiScaleDiscriminator(3, width=4)(torch.zeros(1, 3, 64, 16))
