"""The targets of the fuzzer, without the fuzzer: each reads what it begins with, and refuses what is none of it."""

from __future__ import annotations

import warnings

import pytest
from campaign import fuzz_readers
from campaign_checks import SECONDS

pytestmark = pytest.mark.timeout(SECONDS)


@pytest.mark.parametrize("name", ["config", "csv", "parquet", "image", "weights", "npy", "meta"])
def test_a_target_takes_its_seeds_and_refuses_noise(name: str) -> None:
    suffix, read, seeds = fuzz_readers.targets()[name]
    path = fuzz_readers.FOLDER / f"seed{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in [*seeds, b"", b"noise", bytes(range(256))]:
            fuzz_readers.run(suffix, read, data)
        if name != "config":  # those of the other verbs are no configs of a training
            for data in seeds:
                path.write_bytes(data)
                read(path)


def test_what_is_no_refusal_is_a_finding() -> None:
    def crash(path: object) -> None:
        raise KeyError(path)

    with pytest.raises(KeyError):
        fuzz_readers.run("", crash, b"")
