"""What a recipe may say, with ranges; an unknown key is an error."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from epdistill.recipes.ablation import AblateRecipe
from epdistill.recipes.baselines import BaselinesRecipe, check_model
from epdistill.recipes.section import Section as _Section

Fraction = Field(ge=0.0, lt=1.0)


class DataRecipe(_Section):
    """Which images, and how training batches are varied.

    Attributes:
        name: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn` or `folder:PATH`.
        image_size: Side in pixels that the images of a folder are resized to.
        validation_fraction: Share of the training set kept for choices.
        stream: Whether the images of a folder stay on disk and are decoded when they are
            needed, with the same result; `auto`: if they would fill a quarter of the memory.
        workers: Processes that then decode ahead of training, per training process.
        crop_padding: Pixels of padding for random crops; 0 is off.
        padding_mode: How the padding is filled.
        flip: Mirror images with probability 1/2.
    """

    name: str = "digits"
    image_size: int | None = Field(default=None, ge=8, le=224)
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=0.9)
    stream: bool | Literal["auto"] = "auto"
    workers: int = Field(default=2, ge=0, le=64)
    crop_padding: int = Field(default=0, ge=0, le=32)
    padding_mode: Literal["reflect", "edge", "zeros"] = "reflect"
    flip: bool = False


class LayerRecipe(_Section):
    """One layer of an EP-CNN, as `[[teacher.layers]]` in a recipe.

    Attributes:
        channels: Output channels.
        kernel: Side of the square kernel; a fully connected layer has that of its input.
        stride: Of the convolution.
        padding: Zeros on each side.
        pool: 2x2 `max` or `average` pool of stride 2, or `none`.
    """

    channels: PositiveInt
    kernel: PositiveInt = 3
    stride: PositiveInt = 1
    padding: int = Field(default=1, ge=0)
    pool: Literal["max", "average", "none"] = "max"


class TeacherRecipe(_Section):
    """The EP-CNN and how it is taught.

    Attributes:
        channels: Channels of every layer; without it `width` doubled per layer, up to four times.
        width: Channels of the first layer where `channels` is absent.
        layers: Every layer in full, instead of the rule from the image size.
        readout: `cross-entropy`: a linear readout outside the dynamics; `mse`: a settling
            output layer on top of the others.
        activation: `half` is clip(h/2, 0, 1), `unit` is clip(h, 0, 1).
        init_scale: Factor on PyTorch's default initial weights of all convolutions, or one per
            layer, the readout last. No layer feeds back to the images and none reads the
            readout back into its drive, so these two may be large; large layers between
            them couple until a nudge tips images into other basins.
        std_scale: Factor on the images' standard deviation that they are divided by.
        mean: Per-channel mean in [0,1]; measured on the training set without it.
        std: Per-channel standard deviation; measured without it.
        schedule: `red-black` or the published `synchronous`.
        omega: Over-relaxation in (0, 2), red-black only.
        tolerance: Residual at which an image counts as settled; 0 spends all sweeps on all.
        sweeps: The most sweeps of the free phase; in teaching, `teach_sweeps` if given.
        teach_sweeps: The most sweeps of the free phase in teaching.
        teach_tolerance: Residual at which the free phase of teaching stops; `tolerance` without it.
        check_every: Sweeps between two looks at the residual.
        nudged_sweeps: The most sweeps of each nudged phase.
        nudged_omega: Over-relaxation of the nudged phases; `omega` without it. A smaller one
            leaves the free state's basin less often.
        nudged_tolerance: Residual at which a nudged phase stops.
        rule: `ep`, or for comparison `bptt` (backpropagation through the last
            `nudged_sweeps` sweeps) or `implicit` (the implicit function theorem).
        beta: Nudging strength.
        estimator: `symmetric`, `one-sided` or `random-sign`.
        tipped: What becomes of images that a nudge pushes into another basin: `keep` them,
            `exclude` them from the gradient, or `clip` their difference to the longest
            of the others (symmetric estimator only).
        back_off: When training loses its footing, go back to the last good state and halve
            all learning rates, at most this often; 0 stops instead.
        learning_rates: One per layer, the readout last; a single one serves all.
        momentum: Of stochastic gradient descent.
        weight_decay: On all parameters.
        batch_size: Images per step.
        epochs: Passes over the training set.
        cosine_epochs: Length of the cosine schedule; all `epochs` without it.
        min_learning_rate: Floor of the cosine schedule.
    """

    channels: tuple[PositiveInt, ...] | None = None
    width: PositiveInt = 32
    layers: tuple[LayerRecipe, ...] | None = None
    readout: Literal["cross-entropy", "mse"] = "cross-entropy"
    activation: Literal["half", "unit"] = "half"
    init_scale: PositiveFloat | tuple[PositiveFloat, ...] = 1.0
    std_scale: PositiveFloat = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    schedule: Literal["red-black", "synchronous"] = "red-black"
    omega: float = Field(default=1.5, gt=0.0, lt=2.0)
    tolerance: float = Field(default=1e-4, ge=0.0, le=0.1)
    sweeps: PositiveInt = 250
    teach_sweeps: PositiveInt | None = None
    teach_tolerance: float | None = Field(default=None, ge=0.0, le=0.1)
    check_every: PositiveInt = 5
    nudged_sweeps: PositiveInt = 30
    nudged_omega: float | None = Field(default=None, gt=0.0, lt=2.0)
    nudged_tolerance: float = Field(default=1e-5, ge=0.0, le=0.1)
    rule: Literal["ep", "bptt", "implicit"] = "ep"
    beta: PositiveFloat = 0.5
    estimator: Literal["symmetric", "one-sided", "random-sign"] = "symmetric"
    tipped: Literal["keep", "exclude", "clip"] = "keep"
    back_off: int = Field(default=0, ge=0, le=20)
    learning_rates: tuple[PositiveFloat, ...] = (0.1,)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=3e-4, ge=0.0)
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 20
    cosine_epochs: PositiveInt | None = None
    min_learning_rate: float = Field(default=1e-5, ge=0.0)


class StudentRecipe(_Section):
    """The student, and how and where it is matched to its teacher.

    Attributes:
        name: `cnn`, `resnet18`, `resnet34`, `mobilenet_v3_small`, `vit_tiny`, or
            `torchvision:NAME` for any classification model of torchvision.
        width: Channels of the student's first stage; its own default without it.
        stages: Names of the stages matched to the teacher's layers, the last layer left
            out; chosen by their sizes without it.
        pretrained: A safetensors or torch file with weights for the backbone to start from.
        loss: `distill` from the teacher, or, as a control, `ce`: cross-entropy with the
            labels, without any teacher.
        label_smoothing: Share of the label spread over all classes.
        match: What is distilled: all layers' `states`, the `last` layer's alone, both with
            the logits, or the `logits` alone.
        distance: Between states: `mse` over the states' variance, `bce` for states in [0,1]
            (the last layer, which is read linearly, keeps `mse`), or `cosine`.
        readout: Of the last layer: the teacher's, `frozen`, or a `learned` one. Without it
            frozen wherever states are matched and the teacher has a linear readout.
        temperature: That both sides' logits are divided by (Hinton et al. 2015).
        inputs: Where in input space: `clean` images, `noise` (every image with Gaussian
            noise), `mix` (half of each batch with noise), `corruption` (every image with one
            of `corruptions`), `adversarial` (where the student's loss is largest).
        targets: Which of the teacher's answers is to be given at such an image: the one
            `there`, or, to learn the neighbourhood away, the one at the `clean` image.
        noise_std: Standard deviation of that noise, in units of the [0,1] pixel range;
            each noisy image draws its own between 0 and this.
        corruptions: Types drawn from, each at a random severity; the default are the four
            that the mean corruption error leaves out.
        adversarial_norm: Of the ball that is searched.
        adversarial_eps: Its radius, on pixels in [0,1].
        adversarial_steps: Gradient steps of that search.
        teacher_tolerance: Residual at which a teacher that relaxes is good enough to learn
            from; its own tolerance without it. Figures are always taken at its own.
        cached_views: Train on this many replayed views of every image and keep the
            teacher's answers to them on disk; 0 asks the teacher in every step.
        fidelity_noise: Standard deviation of the noise under which fidelity is reported.
        fidelity_eps: Linf radius of the PGD-10 under which fidelity is reported.
        state_weight: Weight of the mean over layers of the states' distance.
        logit_weight: Weight of the KL divergence from the teacher's to the student's answer.
        label_weight: Weight of the cross-entropy with the labels beside these two.
        learning_rate: Peak, reached after `warmup` of all steps.
        momentum: Of stochastic gradient descent (Nesterov).
        weight_decay: On convolution and linear weights.
        gradient_clip: Largest norm of the whole gradient; longer ones are scaled down.
        warmup: Share of all steps spent on the linear warm-up.
        batch_size: Images per step.
        epochs: Passes over the training set.
    """

    name: str = "resnet18"
    width: PositiveInt | None = None
    stages: tuple[str, ...] | None = None
    pretrained: str | None = None
    loss: Literal["distill", "ce"] = "distill"
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    match: Literal["states", "last", "logits"] = "states"
    distance: Literal["mse", "bce", "cosine"] = "mse"
    readout: Literal["frozen", "learned"] | None = None
    temperature: PositiveFloat = 1.0
    inputs: Literal["clean", "noise", "mix", "corruption", "adversarial"] = "mix"
    targets: Literal["there", "clean"] = "there"
    noise_std: float = Field(default=0.1, ge=0.0, le=1.0)
    corruptions: tuple[str, ...] = Field(
        default=("speckle_noise", "gaussian_blur", "spatter", "saturate"), min_length=1
    )
    adversarial_norm: Literal["linf", "l2"] = "linf"
    adversarial_eps: PositiveFloat = 8 / 255
    adversarial_steps: PositiveInt = 5
    teacher_tolerance: PositiveFloat | None = None
    cached_views: int = Field(default=0, ge=0)
    fidelity_noise: PositiveFloat = 0.1
    fidelity_eps: PositiveFloat = 8 / 255
    state_weight: float = Field(default=1.0, ge=0.0)
    logit_weight: float = Field(default=1.0, ge=0.0)
    label_weight: float = Field(default=0.0, ge=0.0)
    learning_rate: PositiveFloat = 0.1
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=5e-4, ge=0.0)
    gradient_clip: PositiveFloat = 5.0
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 20


class FullRecipe(_Section):
    """Budgets of `--suite full`, as `[evaluate.full]` in a recipe; radii are those of `evaluate`.

    Attributes:
        steps: PGD steps.
        restarts: PGD's independent starts.
        queries: Queries of both Squares per image.
        apgd_steps: Steps of APGD on the DLR loss.
        cw_steps: Steps of Carlini and Wagner's attack per value of c.
        cw_searches: Values of c that it tries per image.
        deepfool_steps: Steps of DeepFool.
        noise_samples: Random perturbations per image.
        hop_skip_jump_queries: Queries of HopSkipJump per image.
        hop_skip_jump_images: On how many images it runs.
        autoattack_images: On how many images of a model that relaxes AutoAttack runs.
        attack_sweeps: Unrolls that the temporal sweep attacks through.
        prediction_sweeps: Sweeps after which it reads the answer; the settled one is always read.
        temporal_images: On how many images.
        diagnosed_images: On how many images masked gradients and basins are looked for.
    """

    steps: PositiveInt = 40
    restarts: PositiveInt = 5
    queries: PositiveInt = 1000
    apgd_steps: PositiveInt = 100
    cw_steps: PositiveInt = 100
    cw_searches: PositiveInt = 5
    deepfool_steps: PositiveInt = 50
    noise_samples: PositiveInt = 100
    hop_skip_jump_queries: PositiveInt = 2000
    hop_skip_jump_images: PositiveInt = 20
    autoattack_images: int = Field(default=100, ge=100)
    attack_sweeps: tuple[PositiveInt, ...] = (5, 10, 29, 70)
    prediction_sweeps: tuple[PositiveInt, ...] = (10, 29, 70, 250)
    temporal_images: PositiveInt = 100
    diagnosed_images: PositiveInt = 64


class PaperRecipe(_Section):
    """What `--suite paper` leaves open, as `[evaluate.paper]` in a recipe.

    Attributes:
        steps: Steps of the adaptive PGD beside the published one.
        restarts: Its independent starts.
        queries: Queries of Square per image, in both; 1000 were published.
        cw_steps: Steps of Carlini and Wagner's attack; the paper does not say.
        cw_lr: Its step size, in the same way.
    """

    steps: PositiveInt = 20
    restarts: PositiveInt = 5
    queries: PositiveInt = 1000
    cw_steps: PositiveInt = 50
    cw_lr: PositiveFloat = 0.01


class EvaluateRecipe(_Section):
    """What is attacked, and how hard.

    Attributes:
        limit: Test images that are evaluated, drawn by the seed (the first ones in
            `--suite paper`).
        linf: Radii of the Linf balls, in units of the [0,1] pixel range.
        l2: Radii of the L2 balls.
        steps: PGD steps of `--suite quick`.
        queries: Queries of its Square attack per image.
        full: Budgets of `--suite full`.
        paper: Budgets of `--suite paper`.
    """

    limit: PositiveInt = 200
    linf: tuple[PositiveFloat, ...] = (2 / 255, 4 / 255, 8 / 255, 16 / 255)
    l2: tuple[PositiveFloat, ...] = (0.1, 0.25, 0.5, 1.0)
    steps: PositiveInt = 20
    queries: PositiveInt = 200
    full: FullRecipe = FullRecipe()
    paper: PaperRecipe = PaperRecipe()


class Recipe(_Section):
    """A whole path: data, teacher, student, evaluation; and the ablation of it.

    Attributes:
        name: The recipe's name, a run's name starts with it.
        seed: Of initial weights, data order, augmentation, noise and attacks.
        model: The teacher that is trained: `ep-cnn`, or a baseline: `bp-cnn`, `adv-cnn`, `vit`,
            `wca`.
        precision: `float32`, `float64`, or `bfloat16`: relaxations run in bfloat16 and are
            refined by differences from a float32 base (fast where the processor has
            bfloat16 matrix units; in float32 where it has no bfloat16 at all); weights stay
            in float32.
    """

    name: str = "custom"
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: str = "ep-cnn"
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    data: DataRecipe = DataRecipe()
    teacher: TeacherRecipe = TeacherRecipe()
    baselines: BaselinesRecipe = BaselinesRecipe()
    student: StudentRecipe = StudentRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    ablate: AblateRecipe = AblateRecipe()

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        return check_model(name)
