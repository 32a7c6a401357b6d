"""The KL to the base above which a report warns. What is harmless differs from base to base, so it is calibrated."""

from dataclasses import replace

from pitstop.retention.margins import Margins

UNCALIBRATED = 0.05  # nats per token, for a base that no zoo of adapters was measured on
# SHA-256 of a base's weights -> the KL, the larger of both probes, that best tells adapters which lose more than a
# margin from those which do not: the largest sum of sensitivity and specificity (Youden 1950). See CALIBRATION.md.
CALIBRATED: dict[str, float] = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": 0.3,  # SmolLM2-135M-Instruct
}


def for_base(margins: Margins, weights_sha256: str) -> Margins:
    """Return margins that say when the KL warns: as the recipe does, else as was calibrated for this base."""
    return replace(margins, kl_warn=margins.kl_warn or CALIBRATED.get(weights_sha256))


def level(margins: Margins) -> float:
    """Return the KL above which a report warns, nats per token."""
    return UNCALIBRATED if margins.kl_warn is None else margins.kl_warn
