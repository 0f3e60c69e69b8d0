"""Phantoms: synthetic chest radiographs with known findings, in CheXpert's own layout.

`patients` decides who has what, `anatomy` draws a healthy chest, `signs` plants the findings, `write`
puts files on disk. Nothing here is a model of real images: phantoms are for testing the pipeline, with
signs made large enough to see at 112 px and findings far commoner than in a hospital.
"""

from medsae_ray.radiographs.phantom.patients import FINDINGS, PhantomStudy, Sign, patient_studies
from medsae_ray.radiographs.phantom.render import (
    PHANTOM_VERSION,
    PlantedSign,
    Rendering,
    contact_sheet,
    render,
    sample_images,
)
from medsae_ray.radiographs.phantom.write import PhantomSettings, write_phantoms

__all__ = [
    "FINDINGS",
    "PHANTOM_VERSION",
    "PhantomSettings",
    "PhantomStudy",
    "PlantedSign",
    "Rendering",
    "Sign",
    "contact_sheet",
    "patient_studies",
    "render",
    "sample_images",
    "write_phantoms",
]
