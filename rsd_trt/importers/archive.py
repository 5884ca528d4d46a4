"""What torch.save writes, looked at before PyTorch reads it: a zip archive of one pickle and the tensors' bytes.

`torch.load(weights_only=True)` runs no code of a file, but it unpacks what is compressed to whatever size it has, and
calls constructors that take as much memory as they are told. Both are refused here, by what the file says of itself.
PyTorch's reader of archives is another one than Python's, and may find other records in the same bytes: it is given a
copy of those that were looked at.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rsd_trt.errors import UserError, named

PICKLE = "data.pkl"
PROTOCOL = 2  # what torch.save writes, and its reader knows
MAX_PICKLE = 32 << 20  # bytes; those of a state dict have kilobytes
ALIGNED = 64  # bytes that a tensor's place in the archive is a multiple of, as torch.save has it
BLOCK = 1 << 20  # bytes that are copied at once
PADDING_ID = 0x4246  # of the padding that torch.save writes
HEADER, PADDING, ZIP64 = 30, 4, 20  # bytes of a record's header without its name, of a padding's, of a large size
# What a state dict is built from, and the plain values beside it: none of it takes more memory than the file has bytes.
PLAIN = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter)|torch (bfloat|float|int|uint|bool|complex)\d*|"
    r"torch (BFloat16|Half|Float|Double|ComplexFloat|ComplexDouble|Long|Int|Short|Char|Byte|Bool)Storage|"
    r"torch (Size|device)|collections (OrderedDict|Counter)|_codecs encode|(__builtin__|builtins) (set|complex)"
)


@contextlib.contextmanager
def checked_archive(file: Path) -> Iterator[str]:
    """Looks at the names and sizes of the archive's records, and at what its pickle would call. Gives a name for
    torch.load, of a copy in memory of what was looked at; it may be mapped, and the mapping outlives the name.

    Raises:
        UserError: records that are compressed, overlap or are too large.
        pickle.UnpicklingError: the pickle is built from something else than ordinary tensors and plain values.
        Exception: nearly anything, if the file is damaged.
    """
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UserError(f"{file} is compressed ({named(record.filename)}), which torch.save does not do")
        if (declared := sum(record.file_size for record in records)) > size:
            raise UserError(f"{file} has {size} bytes and claims to hold {declared}: its records overlap")
        pickles = [record for record in records if record.filename.lower().endswith(f"/{PICKLE}")]
        if len(pickles) != 1:
            raise UserError(f"{file} holds {len(pickles)} files named {PICKLE}, torch.save writes one")
        if pickles[0].file_size > MAX_PICKLE:
            raise UserError(f"{file}: its {PICKLE} has {pickles[0].file_size} bytes, at most {MAX_PICKLE} are read")
        if len({record.filename.lower() for record in records}) < len(records):  # as PyTorch compares them
            raise UserError(f"{file} holds two records of one name, which torch.save does not write")
        with os.fdopen(os.memfd_create(file.name), "w+b") as copy:
            _copy(archive, records, copy)
            with zipfile.ZipFile(copy) as copied:
                _check_pickle(file, copied.read(pickles[0].filename))
            yield f"/proc/self/fd/{copy.fileno()}"


def _copy(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], copy: IO[bytes]) -> None:
    """Writes the records into an archive that can be read in one way only."""
    with zipfile.ZipFile(copy, "w") as written:
        for record in records:
            info = zipfile.ZipInfo(record.filename)
            info.file_size = record.file_size
            large = record.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
            start = copy.tell() + HEADER + len(record.filename.encode()) + PADDING + ZIP64 * large
            padding = -start % ALIGNED
            info.extra = struct.pack("<HH", PADDING_ID, padding) + bytes(padding)
            with archive.open(record) as source, written.open(info, "w") as target:
                shutil.copyfileobj(source, target, BLOCK)
    copy.flush()


def _check_pickle(file: Path, content: bytes) -> None:
    """Raises what `checked_archive` does about the pickle."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "PROTO" and argument != PROTOCOL:
            raise UserError(f"{file} is of pickle protocol {argument}, torch.save writes {PROTOCOL}")
        if opcode.name == "GLOBAL" and not PLAIN.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")
