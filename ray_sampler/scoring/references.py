"""What pictures are compared with, from every form in which people have it; nothing in a file is executed."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from ray_sampler.errors import RequestError, redact, require
from ray_sampler.networks.formats import KNOWN
from ray_sampler.networks.inert import Foreign, Refused, damage_refused, unpickle
from ray_sampler.networks.nvidia import array_of
from ray_sampler.networks.sources import Source, open_source
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.extractors import bundled
from ray_sampler.scoring.options import DIGITS
from ray_sampler.storage.pictures import Pictures, check_channels, open_pictures

ZIP, PICKLE = b"PK", b"\x80"
"""What a file of statistics begins with."""

NUMBERS = {"mu": np.float64, "sigma": np.float64, "mu_s": np.float64, "sigma_s": np.float64, "features": np.float32}
TEXTS = ("extractor", "sha256")
"""What of an npz file is read at once."""

OF_EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}
"""The extractors of whose features a pickle of EDM2's has statistics, by its own names."""

NAMES = re.compile(
    r"numpy\.(_?core\.)?multiarray\.(scalar|_reconstruct)|numpy\.(ndarray|dtype)|_codecs\.encode"
    r"|dnnlib\.util\.EasyDict|collections\.OrderedDict"
)
"""All that such a pickle may name; each is a stand-in."""


@dataclass(frozen=True)
class Reference:
    """What pictures are compared with: statistics, features, or pictures of which features are made."""

    name: str
    """As it is shown: the name of its file or folder, or digits."""
    sha256: str
    """Of its content, 64 hexadecimal digits."""
    mu: np.ndarray | None = None
    """(D,) float64."""
    sigma: np.ndarray | None = None
    """(D, D) float64, divided by n - 1."""
    features: np.ndarray | None = None
    """(n, D) float32."""
    extractor: tuple[str, str] | None = None
    """Name and SHA-256 of the extractor that made the above; the latter is empty where the file has the name alone.
    None where it does not say."""
    images: Pictures | None = None
    """uint8; whatever of the above is None can be made of them."""
    refused: str = ""
    """Why pictures beside the statistics are not among `images`."""
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    """Mean (2023,) and covariance (2023, 2023), float64, of the spatial features of sFID."""


def open_reference(text: str, extractor: Extractor, flag: str = "--score") -> Reference:
    """The reference that a path, a URL or the name digits means.

    It may be statistics (an npz with mu and sigma, also with pictures, as guided-diffusion's and ours have; a pickle of
    EDM2's), an archive, a run directory, or a folder of pictures.

    Args:
        extractor: of whose features it must be.
        flag: that named it, for messages.

    Raises:
        RequestError: there is none, or it is of other features, empty, of one picture, not finite, or holds objects.
    """
    shown = f"{flag} is {redact(text)}"
    reference = _bundled(shown) if text == DIGITS else _read_from(text, extractor, flag, shown)
    _check(reference, extractor, shown)
    return reference


def _bundled(shown: str) -> Reference:
    data = bundled("held_out.npz")
    return _reference(DIGITS, hashlib.sha256(data).hexdigest(), _members(io.BytesIO(data), shown))


def _read_from(text: str, extractor: Extractor, flag: str, shown: str) -> Reference:
    name = str(redact(text)).rstrip("/").rpartition("/")[2]
    with open_source(text, flag) as found:
        if isinstance(found, Source):
            head = found.file.read(len(ZIP))
            found.file.seek(0)
            require(head != b"", f"{shown}, which is empty")
            pickled = head.startswith(PICKLE)
            require(
                pickled or head == ZIP, f"{shown}, which is neither an npz file, nor a pickle of EDM2's, nor a folder"
            )
            held = _of_edm2(found.file, extractor, shown) if pickled else _members(found.file, shown)
            require(
                "mu" in held or "arr_0" in held,
                f"{shown}, which has neither mu and sigma nor pictures, arr_0; make it by `ray-sampler reference`",
            )
            if "mu" in held:
                statistics = _reference(name, found.sha256(), held)
                return _with_pictures(statistics, text) if "arr_0" in held else statistics
    pictures = open_pictures(text)
    return Reference(name, pictures.fingerprint(), images=pictures)


def _with_pictures(statistics: Reference, text: str) -> Reference:
    """Statistics with the pictures beside them, or with what is wrong with those, as where they are compressed."""
    try:
        pictures = open_pictures(text)
        check_pictures(pictures, str(redact(text)))
        return replace(statistics, images=pictures)
    except RequestError as error:
        return replace(statistics, refused=str(error))


def _reference(name: str, sha256: str, held: Mapping[str, Any]) -> Reference:
    extractor = (held["extractor"], held.get("sha256", "")) if "extractor" in held else None
    spatial = (held["mu_s"], held["sigma_s"]) if {"mu_s", "sigma_s"} <= held.keys() else None
    return Reference(name, sha256, held["mu"], held.get("sigma"), held.get("features"), extractor, spatial=spatial)


def _members(file: BinaryIO, shown: str) -> dict[str, Any]:
    """What an npz file has of statistics, by name; of pictures, which may be large, that they are there."""
    try:
        with np.load(file, allow_pickle=False) as held:
            found: dict[str, Any] = {name: _real(held[name], NUMBERS[name]) for name in NUMBERS if name in held}
            found |= {name: str(held[name]) for name in TEXTS if name in held}
            return found | ({"arr_0": ...} if "arr_0" in held else {})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            reason = "it holds pickled objects, and loading them could run code; write plain arrays by numpy.savez"
        else:
            reason = f"it is damaged, or no npz file of statistics ({' '.join(str(error).split())})"
        raise RequestError(f"{shown}; {reason}") from error


def _real(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Raises ValueError: it does not hold real numbers."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"an array of {array.dtype}, not of real numbers")
    return array.astype(dtype)


def _of_edm2(file: BinaryIO, extractor: Extractor, shown: str) -> dict[str, Any]:
    """The statistics in a pickle {fid: {mu, sigma}, fd_dinov2: {mu, sigma}, num_images}, which is read as data."""
    try:
        with damage_refused():
            content = _items(unpickle(file, KNOWN, allowed=lambda name: NAMES.fullmatch(name) is not None))
            held = {OF_EDM2[key]: _items(content[key]) for key in OF_EDM2 if key in content}
            chosen = held.get(extractor.name)
            arrays = {name: array_of(chosen[name]).astype(np.float64) for name in ("mu", "sigma")} if chosen else {}
    except Refused as error:
        raise RequestError(f"{shown}; {error}") from error
    require(
        bool(arrays),
        f"{shown}, a pickle with statistics of {' and '.join(held) or 'no known extractor'}; --features is "
        f"{extractor.name}, so choose one of those, or give another reference",
    )
    return arrays | {"extractor": extractor.name}


def _items(value: Any) -> dict[Any, Any]:
    """A dictionary of a pickle, or one of a custom class."""
    return value.items if isinstance(value, Foreign) else dict(value)


def _check(reference: Reference, extractor: Extractor, shown: str) -> None:
    """Raises RequestError: it cannot be compared with the extractor's features."""
    name, dims, made = extractor.name, extractor.dims, reference.extractor
    require(
        made is None or (made[0] == name and made[1] in ("", extractor.sha256)),
        f"{shown}, which was made with features of {' '.join(made or ())[:60]}, not of {name} {extractor.sha256[:8]}; "
        "give the --features that made it, or make it again with `ray-sampler reference`",
    )
    for what, sides in (("mu", 1), ("sigma", 2), ("features", 2)):
        array = getattr(reference, what)
        if array is not None:
            right = array.ndim == sides and array.shape[-1] == dims and (what != "sigma" or array.shape[0] == dims)
            require(
                right,
                f"{shown}, whose {what} is of shape {array.shape}, and {name} gives {dims} features; give the "
                "--features that made it",
            )
            finite = bool(np.isfinite(array).all())
            require(finite, f"{shown}, whose {what} has values that are not finite; make it again from finite features")
    require((reference.mu is None) == (reference.sigma is None), f"{shown}, which has mu and no sigma; give both")
    if (sigma := reference.sigma) is not None:
        even = np.abs(sigma - sigma.T).max() <= 1e-3 * np.abs(sigma).max()
        require(
            bool(even and (sigma.diagonal() >= 0).all()),
            f"{shown}, whose sigma is no covariance: it must be symmetric, with no negative variance; make it anew",
        )
    if reference.images is not None:
        check_pictures(reference.images, shown)


def check_pictures(pictures: Pictures, shown: str) -> None:
    """Raises RequestError: no reference can be made of them."""
    require(pictures.dtype == "uint8", f"{shown}, which holds {pictures.dtype} results of a solver; give pictures")
    check_channels(pictures, shown)
    require(pictures.num_samples > 1, f"{shown}, which holds {pictures.num_samples} pictures; at least two are needed")
    require(not pictures.lacking, f"{shown}, a run that lacks {pictures.lacking} samples; run its command again first")
