"""The study of label noise, at a scale that shows nothing but that it runs."""

import json

import digits_study
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_study_writes_rows_and_plot_and_says_what_holds(tmp_path, capsys):
    code = digits_study.main(["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    study = json.loads((tmp_path / "digits_study.json").read_text())
    cases = [(row["label_noise"], row["optimizer"]) for row in study["rows"]]
    assert cases == [(noise, label) for noise, labels in digits_study.CASES.items() for label in labels]
    assert len(study["results"]) == 11
    assert len(study["expected"]) == len(digits_study.EXPECTED)
    assert (tmp_path / "digits_study.png").exists()
    assert code == (0 if all(check["holds"] for check in study["expected"]) else 1)
    assert capsys.readouterr().out.count("points (") == len(digits_study.EXPECTED)
