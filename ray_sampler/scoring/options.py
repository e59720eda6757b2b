"""What is scored against what, and by which features: the flags that say it. None of them decides a sample."""

from __future__ import annotations

from dataclasses import dataclass

from ray_sampler.errors import redact, require
from ray_sampler.options import option

EXTRACTORS = ("inception", "dinov2", "digits")
DIGITS = "digits"
"""The bundled reference, and the extractor that goes with it."""
FUNCTION = "python:"

METRICS = ("fid", "is", "kid", "pr", "sfid")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which network makes features of pictures."""

    features: str | None = option(
        None,
        "Feature extractor: inception, dinov2, digits or python:module:function (default: digits with the reference "
        "digits, else inception).",
        recorded=False,
    )
    features_weights: str | None = option(None, "Path or URL of the extractor's weights.", recorded=False)

    @property
    def extractor(self) -> str:
        """The extractor, where none was asked for by name."""
        return self.features or EXTRACTORS[0]

    def check(self) -> None:
        """Raises RequestError: there is no such extractor."""
        require(
            self.features is None or self.features in EXTRACTORS or self.features.startswith(FUNCTION),
            f"--features is {self.features!r}; it must be one of {', '.join(EXTRACTORS)}, or python:module:function",
        )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(FeatureOptions):
    """Scoring the samples once they are there."""

    score: str | None = option(
        None,
        "Reference to score against: statistics (npz or pkl), an archive, a run directory, a folder of pictures, or "
        "digits (bundled).",
        common=True,
        recorded=False,
    )
    metrics: str = option("fid", f"Metrics, separated by commas: {', '.join(METRICS)}.", recorded=False)

    @property
    def extractor(self) -> str:
        """The extractor: as asked for, else the one that suits the reference."""
        return self.features or (DIGITS if self.score == DIGITS else EXTRACTORS[0])

    @property
    def asked(self) -> tuple[str, ...]:
        """The metrics, each once, in the order of METRICS."""
        names = self.metrics.replace(" ", "").split(",")
        return tuple(metric for metric in METRICS if metric in names)

    def check(self) -> None:
        """Raises RequestError: a metric is unknown, or what is asked for needs a reference and there is none."""
        super().check()
        unknown = set(self.metrics.replace(" ", "").split(",")) - set(METRICS)
        require(
            not unknown,
            f"--metrics is {self.metrics!r}; it must be some of {', '.join(METRICS)}, separated by commas",
        )
        for name in ("features", "features_weights"):
            require(
                self.score is not None or getattr(self, name) is None,
                f"--{name} is {redact(getattr(self, name))!r}, but nothing is scored; give --score REFERENCE too",
            )
        require(
            self.score is not None or self.asked == ("fid",),
            f"--metrics is {self.metrics!r}, but nothing is scored; give --score REFERENCE too",
        )
        require(self.score != "", "--score is empty; it must be a reference")
