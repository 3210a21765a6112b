import csv

import pytest
import torch

import benchmark


def test_a_row_for_every_layer_and_number_of_tokens(tmp_path, capsys):
    file = tmp_path / "costs.csv"
    line = f"--layer Attention Linformer --tokens 16 64 --d_model 8 --num_heads 2 --repeats 2 --csv {file}"
    assert benchmark.main(line.split()) == 0
    rows = list(csv.DictReader(file.open()))
    assert [(row["layer"], row["tokens"]) for row in rows] == [
        ("Attention", "16"),
        ("Attention", "64"),
        ("Linformer", "16"),
        ("Linformer", "64"),
    ]
    assert rows[0]["parameters"] == str(4 * 8 * 8 + 4 * 8)
    # projections, scores and their products with values; a multiply-add is two
    assert float(rows[1]["forward_mflops"]) == pytest.approx(2 * (64 * 4 * 8 * 8 + 2 * 64 * 64 * 8) / 1e6)
    assert all(float(row[name]) > 0 for row in rows for name in row if name != "layer")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 and table[0].startswith("| layer | tokens | parameters |")


def test_peak_of_live_bytes():
    def run():
        first = torch.ones(1000)
        del first
        return torch.ones(3000), torch.ones(500)

    assert benchmark.allocated_peak(run) == pytest.approx(4 * 3500, abs=512)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--layer Atention", "layer='Atention'"),
        ("--tokens 100 101", "--tokens 101"),
        ("--tokens -4", "--tokens -4"),
        ("--d_model 10 --num_heads 3", "num_heads=3"),
        ("--batch_size 0", "--batch_size 0"),
        ("--repeats 0", "--repeats 0"),
        ("--layer KvtAttention --tokens 4", "K=9"),
    ],
)
def test_errors_are_one_line(line, says, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(line.split())
    text = capsys.readouterr().err
    assert end.value.code == 2 and says in text and text.count("\n") == 1
