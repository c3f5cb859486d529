"What is learned from."
from gradnb.data.dataset import Dataset
from gradnb.data.sources import SOURCES, data_root, load_dataset

__all__ = ["SOURCES", "Dataset", "data_root", "load_dataset"]
