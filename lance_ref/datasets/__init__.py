"""Real data sets as arrays: the bundled digits, files in a folder of data, downloads, and folders of pictures."""

from lance_ref.datasets.arrays import load_arrays
from lance_ref.datasets.choice import checksum, has_parts, is_data, open_data
from lance_ref.datasets.dataset import Dataset, batches, resize, validation_split
from lance_ref.datasets.digits import load_digits
from lance_ref.datasets.fetch import cache_dir, data_file
from lance_ref.datasets.folder import ImageFolder, load_folder
from lance_ref.datasets.published import PUBLISHED, Published
from lance_ref.datasets.registry import SOURCES, Source, data_files, load, names

__all__ = [
    "PUBLISHED",
    "SOURCES",
    "Dataset",
    "ImageFolder",
    "Published",
    "Source",
    "batches",
    "cache_dir",
    "checksum",
    "data_file",
    "data_files",
    "has_parts",
    "is_data",
    "load",
    "load_arrays",
    "load_digits",
    "load_folder",
    "names",
    "open_data",
    "resize",
    "validation_split",
]
