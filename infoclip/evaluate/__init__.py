"""Evaluation: segmentation and panoptic metrics, the zero-shot baseline, and one run over a dataset."""
