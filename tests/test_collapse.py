"""A step that is not finite is not saved, and stage 2 says when its features collapse."""
import json

import pytest
from runs import checkpoint_of, lines, model_of, stage1_args, stage2_args

import stage1
import stage2


def test_nothing_is_saved_of_a_step_that_is_not_finite(world, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    real, calls = stage1.distillation_loss, []

    def third_is_nan(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1)
    monkeypatch.setattr(stage1, "distillation_loss", third_is_nan)
    with pytest.raises(SystemExit):
        stage1.main(stage1_args(world, out, "--steps", "8", "--save-every", "0"))
    err = capsys.readouterr().err
    assert "step 2: the loss is nan" in err and "no weight was touched" in err

    saved = json.loads((out / "not-finite.json").read_text())
    assert len(saved["frames"]) == 2 and all((world / name).is_file() for name in saved["frames"])
    assert checkpoint_of(out)["step"] == 2
    assert all(value.isfinite().all() for value in model_of(out).values())


@pytest.mark.slow
def test_stage_2_says_when_features_collapse(world, first, tmp_path, monkeypatch, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    stage2.main(stage2_args(world, first, good, "--steps", "8"))
    for line in lines(good):
        assert line["effective_rank"] > 2 and line["feature_variance"] > 0
    assert "collapse" not in capsys.readouterr().out

    # after the first step the features are nearly one and the same
    real, calls = stage2.features_at_pixels, []

    def towards_one(encoder, batch):
        calls.append(1)
        features = real(encoder, batch)
        if len(calls) == 1:
            return features
        return 0.01 * features + features.mean(0).detach()
    monkeypatch.setattr(stage2, "features_at_pixels", towards_one)
    stage2.main(stage2_args(world, first, bad, "--steps", "8"))
    assert "features collapse, feature_variance" in "".join(capsys.readouterr())
    logged = [text for line in lines(bad) for text in line.get("collapse", ())]
    assert any("feature_variance" in text for text in logged)

    # a resumed run knows what the spread was at first
    before = checkpoint_of(bad)["spread"]
    stage2.main(stage2_args(world, first, bad, "--steps", "8"))
    assert checkpoint_of(bad)["spread"] == before
