"""Real data sets as arrays: the bundled digits, files in a folder of data, and folders of pictures."""

from lance_ref.datasets.dataset import Dataset, batches, resize
from lance_ref.datasets.digits import load_digits
from lance_ref.datasets.files import load_folder
from lance_ref.datasets.registry import SOURCES, Source, data_file, load, names

__all__ = [
    "SOURCES",
    "Dataset",
    "Source",
    "batches",
    "data_file",
    "load",
    "load_digits",
    "load_folder",
    "names",
    "resize",
]
