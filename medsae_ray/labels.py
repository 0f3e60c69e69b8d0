"""The 14 clinical labels, under the names and in the order of CheXpert's `train.csv`.

Labels are addressed by name everywhere: MedCLIP's own constants, MIMIC-CXR-JPG and CheXpert Plus
list the same names in other orders.
"""

LABELS: tuple[str, ...] = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
