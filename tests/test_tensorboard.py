"""TensorBoard files: decoded here by a parser of its own, from the format's description."""

import math
import struct
from io import BytesIO

from PIL import Image

from trainer.tensorboard import TensorBoardWriter, _masked_crc


def crc32c(data):
    crc = 0xFFFFFFFF
    for bit in (byte >> i & 1 for byte in data for i in range(8)):
        crc = crc >> 1 ^ (0x82F63B78 if (crc ^ bit) & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmask(masked):
    rotated = (masked - 0xA282EAD8) % 2**32
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def message(data):
    """Fields of one protobuf message: number -> value."""
    stream, fields = BytesIO(data), {}

    def varint():
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while stream.tell() < len(data):
        number, wire = divmod(varint(), 8)
        read = {0: varint, 1: lambda: struct.unpack("<d", stream.read(8))[0], 2: lambda: stream.read(varint()),
                5: lambda: struct.unpack("<f", stream.read(4))[0]}[wire]
        fields[number] = read()
    return fields


def events(folder):
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,), (head,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            body, (tail,) = data[12:12 + length], struct.unpack("<I", data[12 + length:16 + length])
            assert unmask(head) == crc32c(data[:8]) and unmask(tail) == crc32c(body)
            found.append(message(body))
            data = data[16 + length:]
    return found


def test_the_checksum_is_the_standard_one():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert unmask(struct.unpack("<I", _masked_crc(b"123456789"))[0]) == 0xE3069283


def test_scalars_are_read_back_with_tag_step_and_time(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tb")
    rows = [("loss/train", 0.125, 1), ("rank/attn1 é", -2.5, 300), ("loss/train", math.inf, 2**40)]
    for row in rows:
        writer.scalar(*row)
    writer.close()
    head, *found = events(tmp_path / "tb")
    assert head[3] == b"brain.Event:2" and 7 not in head
    values = [message(message(event[5])[1]) for event in found]
    assert [(value[1].decode(), value[2], event[2]) for value, event in zip(values, found)] == rows
    assert all(1.7e9 < event[1] < 1e10 for event in found)


def test_images_are_read_back(tmp_path):
    png = BytesIO()
    Image.new("RGB", (300, 20), "red").save(png, "PNG")
    writer = TensorBoardWriter(tmp_path)
    writer.image("samples/0", png.getvalue(), 300, 20, 50)
    writer.close()
    value = message(message(events(tmp_path)[1][5])[1])
    assert value[1] == b"samples/0" and message(value[4]) == {1: 20, 2: 300, 3: 3, 4: png.getvalue()}


def test_what_is_written_is_there_before_the_end(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.scalar("loss", 1.0, 1)
    assert len(events(tmp_path)) == 2
    writer.close()


def test_a_resume_says_from_which_step_on_earlier_files_are_void(tmp_path):
    for first_step in (0, 40):
        TensorBoardWriter(tmp_path, first_step).close()
    assert [path.name.startswith("events.out.tfevents.") for path in tmp_path.iterdir()] == [True, True]
    start = events(tmp_path)[-1]
    assert start[2] == 40 and message(start[7]) == {1: 1}
