from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.specs.files import read_record, read_text, write_record
from soloist.specs.workload import Load


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match=r"plan = '.*/none': cannot be read: No such file"):
        read_text(tmp_path / "none", "plan")
    with pytest.raises(ConfigurationError, match=r"plan = '.*': cannot be read: Is a directory"):
        read_text(tmp_path, "plan")
    with pytest.raises(ConfigurationError, match=r"plan = '.*/binary': cannot be read: it is no text in UTF-8"):
        read_record(binary, Load, "plan")


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfa,b\n")
    assert read_text(tmp_path / "marked", "data") == "a,b\n"


def test_a_record_is_read_as_written(tmp_path: Path) -> None:
    load = Load.parse("prompt=1000,output=200")
    write_record(tmp_path / "load", load)
    assert read_record(tmp_path / "load", Load, "load") == load
    (tmp_path / "other").write_text('{"prompt": "long"}')
    with pytest.raises(ConfigurationError, match=r"load = '.*/other': is not a load file: .*prompt"):
        read_record(tmp_path / "other", Load, "load")
