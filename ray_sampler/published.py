"""The table of published checkpoints, and of the models that come with the package.

Scores are those that the authors report: FID, and FDD where a row is tuned for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CONSISTENCY_MODELS = "https://openaipublic.blob.core.windows.net/consistency/"
EDM_FOLDER = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
DIT_FOLDER = "https://dl.fbaipublicfiles.com/DiT/models/"
EDM2_FOLDER = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"


@dataclass(frozen=True)
class Preset:
    """Settings for a checkpoint that was published or is in the package, and where that is."""

    description: str
    file: str
    """Its name where it was published; empty where it is not a plain file at an address, or is in the package."""
    parameters: int
    settings: Mapping[str, Any]
    """By flag name."""
    folder: str = CONSISTENCY_MODELS
    """The address it was published under."""
    score: str = ""
    """What its authors report."""

    @property
    def url(self) -> str:
        return self.folder + self.file


IMAGENET64 = {
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "class_cond": True,
    "num_classes": 1000,
}
LSUN256 = {
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "use_scale_shift_norm": False,
    "class_cond": False,
}
DIGITS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "class_cond": True,
    "num_classes": 10,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}

EDM = {"training_mode": "edm", "sampler": "heun", "steps": 40}
CD = {"training_mode": "consistency_distillation"}
CT = {"training_mode": "consistency_training"}
ONE_STEP = {"sampler": "onestep", "steps": 40}

IMAGENET64_PARAMETERS = 295_899_267
LSUN256_PARAMETERS = 526_304_771
DIGITS_PARAMETERS = 1_372_387
DIGITS_EMBEDDING = 128
"""Of a label."""


def _multistep(ts: str, steps: int = 40) -> dict[str, Any]:
    return {"sampler": "multistep", "steps": steps, "ts": ts}


def _imagenet64(description: str, file: str, settings: Mapping[str, Any]) -> Preset:
    return Preset(f"{description}, ImageNet 64x64", file, IMAGENET64_PARAMETERS, {**IMAGENET64, **settings})


def _lsun256(description: str, category: str, file: str, settings: Mapping[str, Any]) -> Preset:
    return Preset(f"{description}, LSUN {category} 256x256", file, LSUN256_PARAMETERS, {**LSUN256, **settings})


ADM: dict[str, Preset] = {
    "edm-imagenet64": _imagenet64("EDM", "edm_imagenet64_ema.pt", EDM),
    "cd-imagenet64-l2": _imagenet64(
        "consistency distillation (l2)", "cd_imagenet64_l2.pt", {**CD, **_multistep("0,22,39")}
    ),
    "cd-imagenet64-lpips": _imagenet64(
        "consistency distillation (LPIPS)", "cd_imagenet64_lpips.pt", {**CD, **_multistep("0,22,39")}
    ),
    "ct-imagenet64": _imagenet64("consistency training", "ct_imagenet64.pt", {**CT, **_multistep("0,106,200", 201)}),
    "edm-bedroom256": _lsun256("EDM", "Bedroom", "edm_bedroom256_ema.pt", EDM),
    "cd-bedroom256-l2": _lsun256(
        "consistency distillation (l2)", "Bedroom", "cd_bedroom256_l2.pt", {**CD, **_multistep("0,18,39")}
    ),
    "cd-bedroom256-lpips": _lsun256(
        "consistency distillation (LPIPS)", "Bedroom", "cd_bedroom256_lpips.pt", {**CD, **_multistep("0,17,39")}
    ),
    "ct-bedroom256": _lsun256(
        "consistency training", "Bedroom", "ct_bedroom256.pt", {**CT, **_multistep("0,67,150", 151)}
    ),
    "edm-cat256": _lsun256("EDM", "Cat", "edm_cat256_ema.pt", EDM),
    "cd-cat256-l2": _lsun256("consistency distillation (l2)", "Cat", "cd_cat256_l2.pt", {**CD, **ONE_STEP}),
    "cd-cat256-lpips": _lsun256("consistency distillation (LPIPS)", "Cat", "cd_cat256_lpips.pt", {**CD, **ONE_STEP}),
    "ct-cat256": _lsun256("consistency training", "Cat", "ct_cat256.pt", {**CT, **_multistep("0,62,150", 151)}),
}
"""Two steps where indices for them were published, else one."""

CHURN = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
"""Of EDM's ImageNet-64 (Karras et al. 2022, table 5)."""


def _edm(what: str, file: str, parameters: int, steps: int, score: str, **settings: Any) -> Preset:
    return Preset(f"EDM, {what}", file, parameters, {"sampler": "heun", "steps": steps} | settings, EDM_FOLDER, score)


EDM_SNAPSHOTS: dict[str, Preset] = {
    "edm-cifar10-32x32-cond-vp": _edm(
        "CIFAR-10, conditional, DDPM++", "edm-cifar10-32x32-cond-vp.pkl", 55_735_299, 18, "FID 1.79"
    ),
    "edm-cifar10-32x32-cond-ve": _edm(
        "CIFAR-10, conditional, NCSN++", "edm-cifar10-32x32-cond-ve.pkl", 56_400_643, 18, "FID 1.79"
    ),
    "edm-cifar10-32x32-uncond-vp": _edm(
        "CIFAR-10, DDPM++", "edm-cifar10-32x32-uncond-vp.pkl", 55_733_891, 18, "FID 1.97"
    ),
    "edm-cifar10-32x32-uncond-ve": _edm(
        "CIFAR-10, NCSN++", "edm-cifar10-32x32-uncond-ve.pkl", 56_397_827, 18, "FID 1.98"
    ),
    "edm-ffhq-64x64-uncond-vp": _edm("FFHQ 64x64, DDPM++", "edm-ffhq-64x64-uncond-vp.pkl", 61_805_571, 40, "FID 2.39"),
    "edm-ffhq-64x64-uncond-ve": _edm("FFHQ 64x64, NCSN++", "edm-ffhq-64x64-uncond-ve.pkl", 62_761_091, 40, "FID 2.53"),
    "edm-afhqv2-64x64-uncond-vp": _edm(
        "AFHQv2 64x64, DDPM++", "edm-afhqv2-64x64-uncond-vp.pkl", 61_805_571, 40, "FID 1.96"
    ),
    "edm-afhqv2-64x64-uncond-ve": _edm(
        "AFHQv2 64x64, NCSN++", "edm-afhqv2-64x64-uncond-ve.pkl", 62_761_091, 40, "FID 2.16"
    ),
    "edm-imagenet-64x64-cond-adm": _edm(
        "ImageNet 64x64, ADM", "edm-imagenet-64x64-cond-adm.pkl", IMAGENET64_PARAMETERS, 256, "FID 1.36", **CHURN
    ),
}

EDM2_PARAMETERS = {
    ("img512", "xs"): 124_713_253,
    ("img512", "s"): 280_212_837,
    ("img512", "m"): 497_807_781,
    ("img512", "l"): 777_498_085,
    ("img512", "xl"): 1_119_283_749,
    ("img512", "xxl"): 1_523_164_773,
    ("img64", "s"): 280_209_381,
    ("img64", "m"): 497_803_173,
    ("img64", "l"): 777_492_325,
    ("img64", "xl"): 1_119_276_837,
}
"""Of class-conditional networks, with the weights that only training uses."""

EDM2_LABELS = {"s": 768 * 1000}
"""Weights that embed labels, which unconditional networks do not have."""

EDM2_TRAINED = {
    ("img512", "xs"): 2147483,
    ("img512", "s"): 2147483,
    ("img512", "m"): 2147483,
    ("img512", "l"): 1879048,
    ("img512", "xl"): 1342177,
    ("img512", "xxl"): 939524,
    ("img64", "s"): 1073741,
    ("img64", "m"): 2147483,
    ("img64", "l"): 1073741,
    ("img64", "xl"): 671088,
}
"""Thousands of images that a network has seen, by data set and size."""

Row = tuple[str, str, float, float]
"""Size, measure, EMA standard deviation, published value."""

EDM2_PLAIN: dict[str, tuple[Row, ...]] = {
    "img512": (
        ("xs", "fid", 0.135, 3.53),
        ("s", "fid", 0.130, 2.56),
        ("m", "fid", 0.100, 2.25),
        ("l", "fid", 0.085, 2.06),
        ("xl", "fid", 0.085, 1.96),
        ("xxl", "fid", 0.070, 1.91),
        ("xs", "dino", 0.200, 103.39),
        ("s", "dino", 0.190, 68.64),
        ("m", "dino", 0.155, 58.44),
        ("l", "dino", 0.155, 52.25),
        ("xl", "dino", 0.155, 45.96),
        ("xxl", "dino", 0.150, 42.84),
    ),
    "img64": (
        ("s", "fid", 0.075, 1.58),
        ("m", "fid", 0.060, 1.43),
        ("l", "fid", 0.040, 1.33),
        ("xl", "fid", 0.040, 1.33),
    ),
}

EDM2_GUIDED: tuple[tuple[str, str, float, float, float], ...] = (
    ("xs", "fid", 0.045, 1.4, 2.91),
    ("s", "fid", 0.025, 1.4, 2.23),
    ("m", "fid", 0.030, 1.2, 2.01),
    ("l", "fid", 0.015, 1.2, 1.88),
    ("xl", "fid", 0.020, 1.2, 1.85),
    ("xxl", "fid", 0.015, 1.2, 1.81),
    ("xs", "dino", 0.150, 1.7, 79.94),
    ("s", "dino", 0.085, 1.9, 52.32),
    ("m", "dino", 0.015, 2.0, 41.98),
    ("l", "dino", 0.035, 1.7, 38.20),
    ("xl", "dino", 0.030, 1.7, 35.67),
    ("xxl", "dino", 0.015, 1.7, 33.09),
)
"""Size, measure, EMA deviation, weight, value; the guide is the unconditional XS network of the same EMA deviation."""

EDM2_AUTOGUIDED: tuple[tuple[str, str, str, str, str, float, float], ...] = (
    ("img512", "s", "fid", "s-2147483-0.070", "xs-0134217-0.125", 2.10, 1.34),
    ("img512", "s", "dino", "s-2147483-0.120", "xs-0134217-0.165", 2.45, 36.67),
    ("img512", "xxl", "fid", "xxl-0939524-0.075", "m-0268435-0.155", 2.05, 1.25),
    ("img512", "xxl", "dino", "xxl-0939524-0.130", "m-0268435-0.205", 2.30, 24.18),
    ("img512", "s-uncond", "fid", "s-uncond-2147483-0.070", "xs-uncond-0134217-0.110", 2.85, 3.86),
    ("img512", "s-uncond", "dino", "s-uncond-2147483-0.090", "xs-uncond-0134217-0.125", 2.90, 90.39),
    ("img64", "s", "fid", "s-1073741-0.045", "xs-0134217-0.110", 1.70, 1.01),
    ("img64", "s", "dino", "s-1073741-0.105", "xs-0134217-0.175", 2.20, 31.85),
)
"""Data set, size, measure, network, guide, weight, value (Karras et al. 2024, "Guiding a diffusion model with a bad
version of itself")."""

MEASURES = {"fid": "FID", "dino": "FDD"}
DATA_SETS = {"img512": "ImageNet 512x512, latents", "img64": "ImageNet 64x64"}


def _edm2(data: str, size: str, measure: str, network: str, value: float, **guidance: Any) -> Preset:
    plain = size.removesuffix("-uncond")
    conditional = "" if plain == size else ", unconditional"
    return Preset(
        f"EDM2-{plain.upper()}{conditional}, {DATA_SETS[data]}",
        f"edm2-{data}-{network}.pkl",
        EDM2_PARAMETERS[data, plain] - (EDM2_LABELS[plain] if conditional else 0),
        {"sampler": "heun", "steps": 32} | guidance,
        EDM2_FOLDER,
        f"{MEASURES[measure]} {value:g}",
    )


def _edm2_presets() -> Iterator[tuple[str, Preset]]:
    for data, rows in EDM2_PLAIN.items():
        for size, measure, deviation, value in rows:
            network = f"{size}-{EDM2_TRAINED[data, size]:07d}-{deviation:.3f}"
            yield f"edm2-{data}-{size}-{measure}", _edm2(data, size, measure, network, value)
    for size, measure, deviation, weight, value in EDM2_GUIDED:
        network = f"{size}-{EDM2_TRAINED['img512', size]:07d}-{deviation:.3f}"
        guide = f"{EDM2_FOLDER}edm2-img512-xs-uncond-2147483-{deviation:.3f}.pkl"
        preset = _edm2("img512", size, measure, network, value, guidance=weight, guide=guide)
        yield f"edm2-img512-{size}-guid-{measure}", preset
    for data, size, measure, network, guided_by, weight, value in EDM2_AUTOGUIDED:
        guide = f"{EDM2_FOLDER}edm2-{data}-{guided_by}.pkl"
        preset = _edm2(data, size, measure, network, value, guidance=weight, guide=guide)
        yield f"edm2-{data}-{size}-autog-{measure}", preset


FIRST_THREE = {"guidance": 1.5, "guidance_channels": 3}
"""Of DiT and SiT, whose scripts guide three channels of four."""
EPS = {"prediction": "eps", "sampler": "ddpm", "steps": 250, **FIRST_THREE}
FLOW = {"prediction": "velocity", "sampler": "flow_sde", "steps": 250}

TRANSFORMERS: dict[str, Preset] = {
    "dit-xl2-256": Preset(
        "DiT-XL/2, ImageNet 256x256, latents", "DiT-XL-2-256x256.pt", 675_129_632, EPS, DIT_FOLDER, "FID 2.27"
    ),
    "dit-xl2-512": Preset(
        "DiT-XL/2, ImageNet 512x512, latents", "DiT-XL-2-512x512.pt", 676_014_368, EPS, DIT_FOLDER, "FID 3.04"
    ),
    "sit-xl2-256": Preset(
        "SiT-XL/2, ImageNet 256x256, latents", "", 675_129_632, {**FLOW, "data_at": 1, **FIRST_THREE}, "", "FID 2.06"
    ),
    "repa-sit-xl2": Preset(
        "REPA, SiT-XL/2, ImageNet 256x256, latents",
        "",
        675_111_184,
        {**FLOW, "data_at": 0, "guidance": 1.8, "guidance_interval": "0,0.7"},
        "",
        "FID 1.42",
    ),
}
"""Peebles & Xie 2023, Ma et al. 2024, by the SDE, and Yu et al. 2025, whose projectors are not counted."""

PRESETS: dict[str, Preset] = ADM | EDM_SNAPSHOTS | dict(_edm2_presets()) | TRANSFORMERS
"""By name."""

BUNDLED: dict[str, Preset] = {
    "digits": Preset(
        "EDM, handwritten digits 32x32",
        "",
        DIGITS_PARAMETERS + DIGITS_EMBEDDING,
        {**DIGITS, "label_dropout": 0.1, "training_mode": "edm", "sampler": "dpmpp_2m_sde", "steps": 12},
    ),
    "digits-latent": Preset(
        "flow transformer over latents 4x8x8, handwritten digits 32x32",
        "",
        1_871_120,
        {
            "prediction": "velocity",
            "data_at": 0,
            "num_heads": 4,
            "decoder": "digits-decoder",
            "sampler": "dpmpp_2m",
            "schedule": "shifted",
            "steps": 12,
        },
    ),
    "digits-v1": Preset(
        "EDM, handwritten digits 32x32, the first weights",
        "",
        DIGITS_PARAMETERS,
        {**DIGITS, "training_mode": "edm", "sampler": "heun", "steps": 18},
    ),
    "digits-cd": Preset(
        "consistency distillation of digits, handwritten digits 32x32",
        "",
        DIGITS_PARAMETERS,
        {**DIGITS, **CD, "sampler": "onestep", "steps": 18, "ts": "0,9,17"},
    ),
}
"""ts serves where the user asks for --sampler multistep."""
