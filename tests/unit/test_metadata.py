import csv
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffsynth_pipe.data.metadata import Row, read_metadata
from diffsynth_pipe.errors import DataError

VALUES = [{"image": "a.jpg", "prompt": 'a "quoted", long\nprompt'}, {"image": "b.jpg", "prompt": "una ñ, 猫"}]
ROWS = [Row(number, values) for number, values in enumerate(VALUES, start=1)]


def write_csv(path, rows, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_formats_agree(tmp_path, encoding):
    write_csv(tmp_path / "m.csv", VALUES, encoding)
    (tmp_path / "m.json").write_text(json.dumps(VALUES, indent=2), encoding=encoding)
    (tmp_path / "m.jsonl").write_text("\n\n".join(map(json.dumps, VALUES)) + "\n", encoding=encoding)
    assert read_metadata(tmp_path / "m.csv") == ROWS
    assert read_metadata(tmp_path / "m.json") == ROWS
    assert read_metadata(tmp_path / "m.jsonl") == ROWS


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"image": st.text(min_size=1), "prompt": st.text()}), min_size=1, max_size=5))
def test_any_text_survives(tmp_path, values):
    values = [
        {key: text.encode("utf-8", "ignore").decode().replace("\0", "") or "x" for key, text in row.items()}
        for row in values
    ]
    write_csv(tmp_path / "m.csv", values)
    (tmp_path / "m.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in values), encoding="utf-8"
    )
    assert [row.values for row in read_metadata(tmp_path / "m.csv")] == values
    assert [row.values for row in read_metadata(tmp_path / "m.jsonl")] == values


def test_blank_csv_lines_are_no_rows_and_windows_lines_work(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"image,prompt\r\n\r\na.jpg,\r\n\r\nb.jpg,x\r\n")
    assert read_metadata(tmp_path / "m.csv") == [
        Row(1, {"image": "a.jpg", "prompt": ""}),
        Row(2, {"image": "b.jpg", "prompt": "x"}),
    ]


def test_json_keeps_its_types(tmp_path):
    (tmp_path / "m.json").write_text('[{"image": "a.jpg", "seed": 3, "prompt": null}]')
    assert read_metadata(tmp_path / "m.json")[0].values == {"image": "a.jpg", "seed": 3, "prompt": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "m.csv: holds no rows"),
        ("m.csv", b"image,prompt\n", "m.csv: holds no rows"),
        ("m.csv", b"image,prompt\na.jpg,x\nb.jpg,y,z\n", "m.csv row 2: 3 cells, but the header names 2 columns"),
        ("m.csv", b"image,prompt\na.jpg\n", "m.csv row 1: 1 cells, but the header names 2 columns"),
        ("m.csv", b"image,prompt,image\na,b,c\n", "m.csv: the header names column 'image' twice"),
        ("m.csv", b'image,prompt\na.jpg,"never closed\n', "m.csv line 2: broken csv"),
        ("m.csv", b"image,prompt\na.jpg,caf\xe9\n", "m.csv: byte 22 is not UTF-8"),
        ("m.json", b"", "m.json: holds no rows"),
        ("m.json", b"[]", "m.json: holds no rows"),
        ("m.json", b'[{"a": 1},\n {"a" 2}]', "m.json: broken json .*line 2"),
        ("m.json", b'{"a": 1}', "m.json: holds a dict; expected a list of objects"),
        ("m.json", b'[{"a": 1}, 2]', "m.json row 2: 2 is not an object"),
        ("m.jsonl", b"\n \n", "m.jsonl: holds no rows"),
        ("m.jsonl", b'{"a": 1}\n\n{"a":\n', "m.jsonl line 3: broken json"),
        ("m.jsonl", b'{"a": 1}\n[1]\n', r"m.jsonl line 2: \[1\] is not an object"),
        ("m.parquet", b"PAR1", "m.parquet: metadata of type '.parquet'; expected one of .csv, .json, .jsonl"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_metadata(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"m.csv: cannot be read \(No such file or directory\)"):
        read_metadata(tmp_path / "m.csv")
