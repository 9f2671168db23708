"""Backbones: each builds, lands on the teacher's shapes, learns a step, and folds exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from epdistill.errors import RecipeError
from epdistill.students import backbones, registry
from epdistill.students.backbones import Request, build, names
from epdistill.students.model import Student
from epdistill.students.registry import registered
from epdistill.students.spec import Goal, StudentSpec
from epdistill.students.tapping import find_stages
from epdistill.students.torchvision_nets import adapt_stem, patch_size
from epdistill.teachers.baselines.resnet import BLOCK, Shortcut

GoalOf = Callable[..., Goal]
# Narrow, so that the tests are quick; torchvision's own have no width.
WIDTHS = {"cnn": 4, "resnet18": 4, "resnet34": 4, "mobilenet_v3_small": 8, "vit_tiny": 24}
TORCHVISION = ["torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5"]


def request(size: int, channels: int = 1, **changes: object) -> Request:
    return Request(channels, size, None, ((4, 4, 4), (4, 1, 1)), **changes)  # type: ignore[arg-type]


def test_all_registered_are_tested() -> None:
    assert set(WIDTHS) == set(names())


@pytest.mark.parametrize(
    ("below", "size", "stride"), [(4, 8, 2), (4, 7, 2), (15, 9, 3), (16, 8, 2)]
)
def test_a_shortcut_is_the_convolution_it_stands_for(below: int, size: int, stride: int) -> None:
    shortcut = Shortcut(below, 2 * below, stride).double()
    plain = nn.Conv2d(below, 2 * below, 1, stride, bias=False).double()
    plain.load_state_dict(shortcut.state_dict())
    images = torch.randn(3, below, size, size, dtype=torch.float64)
    found, wanted = [], []
    for net, kept in ((shortcut, found), (plain, wanted)):
        maps = net(images.clone().requires_grad_())
        kept += [maps, *torch.autograd.grad(maps.square().sum(), list(net.parameters()))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*WIDTHS, *TORCHVISION])
def test_no_backbone_strides_where_onednn_writes_past_its_memory(name: str, goal: GoalOf) -> None:
    student = Student(StudentSpec(name, WIDTHS.get(name), goal(32, 3)))
    for module in student.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            safe = module.stride == (1, 1) or module.in_channels >= BLOCK
            assert safe or isinstance(module, Shortcut), module


@pytest.mark.parametrize("name", [*WIDTHS, *TORCHVISION])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_a_backbone_serves(name: str, size: int, channels: int, goal: GoalOf) -> None:
    torch.manual_seed(0)
    student = Student(StudentSpec(name, WIDTHS.get(name), goal(size, channels)))
    student.take_readout(torch.randn_like(student.readout_weight), torch.zeros(5))
    images = torch.rand(4, channels, size, size)
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    landed, logits = student.match(images)
    assert tuple(tuple(m.shape[1:]) for m in landed) == goal(size, channels).shapes
    assert logits.shape == (4, 5)
    loss = sum((m - 0.5).square().mean() for m in landed) + logits.square().mean()
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    moved = [n for n, p in student.named_parameters() if not torch.equal(p, before[n])]
    assert "head.weight" in moved
    assert any(n.startswith("backbone.") for n in moved)
    student.eval()
    with torch.no_grad():
        answers = student(images)
        assert torch.equal(answers, student.match(images)[1])
        assert answers.abs().max() > 0
        torch.testing.assert_close(student.folded()(images), answers, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet34", "vit_tiny"])
def test_width_scales(name: str) -> None:
    def size(width: int | None) -> int:
        net = build(name, Request(1, 8, width, ((4, 4, 4), (4, 1, 1))))
        return sum(p.numel() for p in net.parameters())

    default = {"mobilenet_v3_small": 16, "resnet34": 64, "vit_tiny": 192}[name]
    assert size(WIDTHS[name]) < size(default) / 3
    if name == "mobilenet_v3_small":
        assert size(default) == size(None)


def test_small_images_keep_their_resolution_in_the_stem() -> None:
    image = torch.rand(2, 3, 32, 32)
    for name in ("resnet18", "mobilenet_v3_small", "torchvision:squeezenet1_1"):
        maps = build(name, request(32, 3)).eval()(image)
        assert maps[0].shape[2] == 32, name
        assert maps[-1].shape[2:] == (1, 1)
    large = build("torchvision:squeezenet1_1", request(64, 3)).eval()
    assert [m.shape[2] for m in large(torch.rand(2, 3, 64, 64))[:2]] == [31, 15]


def test_a_stem_of_stride_one_keeps_its_pools() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    first, pool = net[0], net[1]
    adapt_stem(net, request(32, 3))
    assert net[0] is first
    assert net[1] is pool
    # Grey images need another first layer, and still no other stem.
    adapt_stem(net, request(32, 1))
    assert net[0].weight.shape == (8, 1, 3, 3)
    assert net[1] is pool
    # A striding stem stops striding and loses its pool.
    net[0] = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    adapt_stem(net, request(32, 3))
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 8, 30, 30)
    assert net[0].bias is None


def test_stages_end_where_the_resolution_does() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.skip, self.main = nn.Conv2d(4, 8, 1, 2), nn.Conv2d(4, 8, 3, 2, 1)
            self.inner = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = x + self.b(x)
            # `inner` is the last map of its size, but the skip goes past it.
            x = self.main(self.inner(x)) + self.skip(x)
            answer: torch.Tensor = self.fc(x.mean((2, 3)))
            return answer

    assert find_stages(Net(), request(8)) == ["add", "add_1"]


def test_a_stage_can_be_a_module() -> None:
    net = build("torchvision:resnet18", request(16, stages=("layer1", "layer3.0.conv1")))
    assert net.names[:2] == ("layer1", "layer3.0.conv1")  # type: ignore[index]
    maps = net.eval()(torch.rand(2, 1, 16, 16))
    assert [m.shape[1] for m in maps[:2]] == [64, 256]
    with pytest.raises(RecipeError, match=r"unknown stage 'layer9'.*expected nodes such as layer1"):
        build("torchvision:resnet18", request(16, stages=("layer9",)))


def test_running_statistics_follow_a_short_training() -> None:
    net = build("mobilenet_v3_small", request(8))
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert all(m.momentum == 0.1 for m in norms)


def test_patches() -> None:
    assert [patch_size(size) for size in (8, 16, 28, 32, 64, 224)] == [2, 2, 4, 4, 8, 16]
    with pytest.raises(RecipeError, match="vit_tiny cannot cut 31x31 images"):
        patch_size(31)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match=r"did you mean resnet50"):
        build("torchvision:resnet5", request(32))
    with pytest.raises(RecipeError, match=r"has none; leave --width away"):
        build("torchvision:resnet18", Request(1, 32, 8, ((4, 4, 4), (4, 1, 1))))
    with pytest.raises(RecipeError, match=r"width 25 for vit_tiny; expected a multiple of 3"):
        build("vit_tiny", Request(1, 8, 25, ((4, 4, 4), (4, 1, 1))))


@pytest.mark.parametrize("net", [nn.Conv2d(1, 4, 9), nn.Conv2d(3, 4, 3), nn.Flatten()])
def test_a_backbone_that_cannot_take_the_images(
    net: nn.Module, goal: GoalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", registered())
    backbones.register("tapped")(lambda request: backbones.tap(net, request))
    backbones.register("staged")(lambda request: backbones.Stages(nn.Identity(), [net]))
    for name in ("tapped", "staged"):
        with pytest.raises(RecipeError, match=f"student {name} cannot take 8x8 images with 1 chan"):
            Student(StudentSpec(name, None, goal(8)))


def test_the_documented_own_backbone(goal: GoalOf, monkeypatch: pytest.MonkeyPatch) -> None:
    text = backbones.__doc__ or ""
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.setattr(registry, "_BUILDERS", registered())
    exec(code, {})
    student = Student(StudentSpec("mine", None, goal(8)))
    landed, logits = student.match(torch.rand(2, 1, 8, 8))
    assert tuple(tuple(m.shape[1:]) for m in landed) == goal(8).shapes
    assert logits.shape == (2, 5)


class Viewing(nn.Module):
    """Uses `view` on a map, as only images in the usual order allow."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, 4)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        below = self.below(images)
        return [below, self.above(below.view(len(images), -1)).view(-1, 4, 1, 1)]


def test_bundled_backbones_get_the_channels_innermost_and_a_users_own_does_not(
    goal: GoalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", registered())
    backbones.register("viewing")(lambda request: Viewing())
    seen: dict[str, bool] = {}
    images = torch.rand(3, 3, 8, 8)
    for name in ("viewing", "cnn", "torchvision:squeezenet1_1"):
        student = Student(StudentSpec(name, WIDTHS.get(name), goal(8, 3))).eval()

        def look(_: nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
            seen[name] = args[0].is_contiguous(memory_format=torch.channels_last)

        student.backbone.register_forward_pre_hook(look)
        with torch.no_grad():
            answers = student(images)
            alone = torch.cat([student(image[None]) for image in images])
        torch.testing.assert_close(answers, alone, rtol=1e-4, atol=1e-5)
        student(images)
        assert seen[name] == (name != "viewing")
