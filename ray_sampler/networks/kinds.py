"""What a file is that is no checkpoint, by its first bytes, and what to do with it."""

from __future__ import annotations

BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "it is a pointer of Git LFS and not the file itself; fetch that with git lfs pull, or download it by itself",
    ),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it with unzstd"),
    (b"\xfd7zXZ\x00", "it is compressed with xz; unpack it with unxz"),
    (b"BZh", "it is compressed with bzip2; unpack it with bunzip2"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7-Zip archive; unpack it and name the checkpoint in it"),
    (b"PK\x05\x06", "it is an empty zip archive"),
    (b"\x93NUMPY", "it is an array of NumPy and no checkpoint"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes, and no checkpoint of PyTorch"),
    (b"GGUF", "it is a GGUF file of quantised weights; name the checkpoint that it was made of"),
    (b"\x89PNG", "it is a picture"),
    (b"\xff\xd8\xff", "it is a picture"),
    (b"%PDF", "it is a PDF document"),
)
TAR_MAGIC = slice(257, 262)


def foreign_kind(head: bytes) -> str:
    """One sentence on a file that begins with `head` and is none that is read; it follows "--model is FILE; "."""
    if not head:
        return "it is empty: truncated, or not written yet"
    for beginning, said in BEGINNINGS:
        if head.startswith(beginning):
            return said
    if head[TAR_MAGIC] == b"ustar":
        return "it is a tar archive; unpack it and name the checkpoint in it"
    text = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or (text.startswith(b"<") and b"<html" in text):
        return "it is an HTML page, such as a site shows in place of a download; check the address"
    if text.startswith(b"<?xml"):
        return "it is an XML text, such as a storage service answers with in place of a file; check the address"
    if text.startswith((b"{", b"[")):
        return "it is a JSON text, such as the configuration of a network; name the file with its weights"
    if text and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in text):
        return "it is text, not a checkpoint; name a file with weights"
    return "it is truncated, damaged, or no checkpoint (torch.save, safetensors or pickle)"
