from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from training_data import CLASSES, write_folders

from infoclip.config import DataConfig
from infoclip.data.folders import FolderDataset
from infoclip.data.loader import ResumableLoader
from infoclip.data.transforms import training_transform
from infoclip.errors import DataError


class Numbers(Dataset[dict[str, Any]]):
    """Sample i is an image and a mask full of i."""

    def __init__(self, count: int, ragged: bool = False) -> None:
        self.count, self.ragged = count, ragged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        height = 8 + (index if self.ragged else 0)
        image = tv_tensors.Image(torch.full((3, height, 8), index, dtype=torch.uint8))
        return {"image": image, "mask": tv_tensors.Mask(torch.full((height, 8), index)), "file": str(index)}


class Broken(Numbers):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            raise DataError("The image 3 is damaged; replace it.")
        return super().__getitem__(index)


def order(loader: ResumableLoader, batches: int) -> list[int]:
    return [int(name) for batch in islice(loader, batches) for name in batch["files"]]


def test_every_epoch_is_a_new_shuffle_of_everything() -> None:
    seen = order(ResumableLoader(Numbers(10), batch_size=3, seed=4), 10)
    epochs = [seen[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen != order(ResumableLoader(Numbers(10), batch_size=3, seed=5), 10)


def test_batch_size_does_not_change_the_order() -> None:
    assert order(ResumableLoader(Numbers(10), 3), 4) == order(ResumableLoader(Numbers(10), 4), 3)


def real(root: Path, workers: int) -> ResumableLoader:
    data = FolderDataset(root / "images", root / "masks", CLASSES)
    transform = training_transform(DataConfig(resize=36, crop=32))
    return ResumableLoader(data, batch_size=2, seed=7, workers=workers, transform=transform)


def test_resume_is_exact_for_any_number_of_workers(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    expected = list(islice(real(root, 0), 9))
    for workers, cut, then in ((0, 4, 2), (2, 5, 0), (2, 3, 1)):
        first = real(root, workers)
        got = list(islice(first, cut))
        state = first.state_dict()
        assert state["consumed"] == 2 * cut  # not what the workers have read ahead
        first.close()
        second = real(root, then)
        second.load_state_dict(state)
        got += list(islice(second, 9 - cut))
        second.close()
        for a, b in zip(got, expected, strict=True):
            assert a["files"] == b["files"]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["mask"], b["mask"])


def test_an_image_is_augmented_anew_in_the_next_epoch(tmp_path: Path) -> None:
    batches = list(islice(real(write_folders(tmp_path, count=2), 0), 2))
    by_file = [dict(zip(b["files"], b["image"], strict=True)) for b in batches]
    assert by_file[0].keys() == by_file[1].keys()
    assert all(not torch.equal(by_file[0][name], by_file[1][name]) for name in by_file[0])


def test_reading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    for workers in (0, 1):
        torch.manual_seed(3)
        loader = real(root, workers)
        next(loader)
        loader.close()
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_faulty_file_is_one_sentence_also_from_a_worker(workers: int) -> None:
    loader = ResumableLoader(Broken(5), batch_size=2, workers=workers)
    with pytest.raises(DataError, match=r"^The image 3 is damaged; replace it\.$"):
        order(loader, 3)
    loader.close()


def test_ragged_batches_are_padded_right_and_below() -> None:
    batch = next(ResumableLoader(Numbers(4, ragged=True), batch_size=4))
    assert batch["image"].shape == (4, 3, 11, 8)
    assert batch["mask"].shape == (4, 11, 8)
    for name, image, mask in zip(batch["files"], batch["image"], batch["mask"], strict=True):
        own = 8 + int(name)
        assert (image[:, :own] == int(name)).all()
        assert (image[:, own:] == 128).all()
        assert (mask[:own] == int(name)).all()
        assert (mask[own:] == 255).all()


def test_empty_data() -> None:
    with pytest.raises(DataError, match="is empty"):
        ResumableLoader(Numbers(0), batch_size=2)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"dataset": Numbers(6)}, "number of images was 5"), ({"seed": 1}, "seed"), ({"batch_size": 3}, "batch size")],
)
def test_a_state_of_other_data_is_refused(change: dict[str, Any], what: str) -> None:
    base: dict[str, Any] = {"dataset": Numbers(5), "batch_size": 2, "seed": 0}
    state = ResumableLoader(**base).state_dict()
    with pytest.raises(DataError, match=what):
        ResumableLoader(**{**base, **change}).load_state_dict(state)
