"""Seeing it: loss surfaces, sharpness and spectra of any model. Needs the extra `analysis`; nothing else imports this package."""

from .arc import ArcProfile, DirectionGain, arc_profile, direction_gain
from .callback import SharpnessCallback
from .curves import training_curves
from .hessian import HessianSpectrum, hessian_operator, hessian_spectrum
from .plane import Plane, landscape, plane
from .sharpness import AverageSharpness, ascent_sharpness, average_sharpness, m_sharpness
from .surface import Surface, batches_of


__all__ = [
    "ArcProfile",
    "AverageSharpness",
    "DirectionGain",
    "HessianSpectrum",
    "Plane",
    "SharpnessCallback",
    "Surface",
    "arc_profile",
    "ascent_sharpness",
    "average_sharpness",
    "batches_of",
    "direction_gain",
    "hessian_operator",
    "hessian_spectrum",
    "landscape",
    "m_sharpness",
    "plane",
    "training_curves",
]
