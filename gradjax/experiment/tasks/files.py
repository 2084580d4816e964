"""Files of data sets: where they lie, the hash they must have, where to download them.

The pinned sha256 is that of the UNPACKED bytes, since the gzip wrapper differs from mirror to
mirror. A file is looked for, as it is or as .gz, in $GRADJAX_DATA_DIR/<data set>, then in pooch's
cache, then downloaded into that cache. No byte is used before its hash has been checked.
"""

import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from gradjax.core.extras import needed_for

VARIABLE = "GRADJAX_DATA_DIR"

# Folders of .gz files, or the one file itself, unpacked.
_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    "text": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
}
# Training images, training labels, test images, test labels.
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_files(*hashes: str) -> dict[str, str]:
    return dict(zip(_IDX_FILES, hashes, strict=True))


# data set -> file -> sha256 of its unpacked bytes
_SHA256 = {
    "mnist": _idx_files(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    # The hashes of the labels were computed from the publisher's repository (.gz with the md5 of
    # its README); those of the images are pinned by three independent public projects, together
    # with the same hashes of the labels.
    "fashion_mnist": _idx_files(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "text": {
        "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    },
}


class DataError(ValueError):
    """Data are missing or altered; the message names file, hash, and where to put a good one."""


class Check(NamedTuple):
    """A file (its path, or its name if missing), the sha256 found (or None), and if intact."""

    file: str
    sha256: str | None
    ok: bool


def pinned(dataset: str) -> tuple[str, ...]:
    """Names of the files of a data set, unpacked; none where it comes with a package."""
    return tuple(_SHA256.get(dataset, ()))


def find(dataset: str, file: str) -> Path | None:
    """The file, as it is or as .gz, in GRADJAX_DATA_DIR or in the cache; None if in neither."""
    for folder in filter(None, (_own_folder(dataset), _cache_folder(dataset))):
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file():
                return path
    return None


def read(dataset: str, file: str) -> bytes:
    """The unpacked bytes of a file, verified; it is downloaded first if not on this machine."""
    return _intact(find(dataset, file) or _download(dataset, file), _SHA256[dataset][file])


def fetch(dataset: str, file: str) -> Path:
    """Path of an intact copy of the file, downloaded if it is missing or damaged in the cache."""
    path = find(dataset, file)
    if path is None:
        return _download(dataset, file)
    try:
        _intact(path, _SHA256[dataset][file])
    except DataError:
        if path.parent != _cache_folder(dataset):
            raise
        path.unlink()
        return _download(dataset, file)
    return path


def verify(dataset: str, file: str) -> Check:
    """Compare what is on this machine with the pinned hash.

    A .gz that does not unpack shows its own hash.
    """
    path = find(dataset, file)
    if path is None:
        return Check(file, None, False)
    expected = _SHA256[dataset][file]
    try:
        digest = _sha256(_unpacked(path, expected))
    except DataError:
        digest = _sha256(path.read_bytes())
    return Check(str(path), digest, digest == expected)


def _own_folder(dataset: str) -> Path | None:
    root = os.environ.get(VARIABLE)
    if root and not Path(root).expanduser().is_dir():
        raise DataError(
            f"data: {VARIABLE} is {root}, which is no folder; needed: one that holds {dataset}/."
        )
    return Path(root).expanduser() / dataset if root else None


def _pooch() -> Any:
    with needed_for("Data with files"):
        import pooch
    return pooch


def _cache_folder(dataset: str) -> Path:
    return Path(_pooch().os_cache("gradjax")) / dataset


def _download(dataset: str, file: str) -> Path:
    """Try the mirrors in order.

    pooch writes beside the target and renames, so no half file stays behind.
    """
    pooch = _pooch()
    # It prints the hash of each file, which is judged here.
    pooch.get_logger().setLevel("WARNING")
    folder, expected, reasons = _cache_folder(dataset), _SHA256[dataset][file], []
    for mirror in _MIRRORS[dataset]:
        host = mirror.split("/")[2]
        url, fname = mirror, file
        if mirror.endswith("/"):
            url, fname = f"{mirror}{file}.gz", f"{file}.gz"
        try:
            path = Path(pooch.retrieve(url, None, fname=fname, path=folder))
        except OSError as error:  # the exceptions of requests are among them
            reasons.append(f"{host}: {type(error).__name__}")
            continue
        try:
            _intact(path, expected)
        except DataError:
            path.unlink()
            reasons.append(f"{host}: other bytes than the pinned ones")
            continue
        return path
    raise DataError(
        f"data: {dataset} needs {file}, sha256 of the unpacked bytes {expected}; it is not in "
        f"{VARIABLE} ({os.environ.get(VARIABLE) or 'not set'}), not in {folder}, and could not be "
        f"downloaded ({'; '.join(reasons)}). Put it into that folder, as it is or as .gz, or set "
        f"{VARIABLE} to a folder that holds {dataset}/{file}.gz."
    )


def _intact(path: Path, expected: str) -> bytes:
    data = _unpacked(path, expected)
    if (digest := _sha256(data)) != expected:
        kind = "unpacked bytes" if path.suffix == ".gz" else "bytes"
        raise DataError(
            f"data: {path} has been altered: the sha256 of its {kind} is {digest}; needed: "
            f"{expected}. Delete it, or put an intact copy in its place."
        )
    return data


def _unpacked(path: Path, expected: str) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"data: {path} does not unpack ({error}): truncated or altered, {len(data)} bytes, "
            f"sha256 {_sha256(data)}; needed: a gzip file whose unpacked bytes have the sha256 "
            f"{expected}. Delete it, or put an intact copy in its place."
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
