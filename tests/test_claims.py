"The five claims, their verdicts and adjustment; model confidence set and SPA with twins, infinite losses, few windows, no arch."
import sys

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from cryptopredict import claims as c
from cryptopredict.protocol import FORECASTERS
from cryptopredict.scores import SCORES, block_standard_error, compare, overlapping_noise

N = 1080  # daily origins: 36 windows of 30 days, 12 of 90
TIMES = pd.date_range("2018-01-01", periods=N, freq="D", tz="UTC")


def losses_of(seed: int = 0, **means: float) -> pd.DataFrame:
    "Losses of one model per name, around these means: noise of their own with the overlap of each label."
    frames = []
    for k, (model, mean) in enumerate(means.items()):
        noise = {loss: overlapping_noise(N, 90 if SCORES[loss].label == "r90" else 30, 1, seed + 7 * k + 100 * i)[0]
                 for i, loss in enumerate(c.CLAIMS)}
        frames.append(pd.DataFrame(dict(time=TIMES, model=model, **{n: mean + .02 * v / v.std() for n, v in noise.items()})))
    return pd.concat(frames, ignore_index=True)


USUAL = dict(climatology_4y=1.0, log_har=1.0, har_ensemble=.9)


@pytest.fixture(scope="module")
def losses() -> pd.DataFrame:
    "Losses in which the default is clearly better than both references."
    return losses_of(**USUAL)


def test_the_claims_are_five_losses_with_known_references():
    assert c.CLAIMS == dict(log_loss="climatology_4y", pinball10="climatology_4y", pinball90="climatology_4y",
                            se_log_sigma="log_har", qlike="log_har")
    assert c.DEFAULT == "har_ensemble" and {"climatology_4y", "log_har"} <= set(FORECASTERS)


def test_a_claim_has_the_numbers_of_compare(losses):
    claims = c.evaluate_claims(losses, n_boot=200).set_index("score")
    assert (claims.verdict == "better").all() and list(claims.index) == [SCORES[loss].summary for loss in c.CLAIMS]
    for reference in ("climatology_4y", "log_har"):
        mine = claims[claims.reference == reference]
        theirs = compare(losses, reference, scores=[loss for loss, r in c.CLAIMS.items() if r == reference], n_boot=200)
        theirs = theirs[theirs.model == "har_ensemble"].set_index("score")
        columns = ["diff", "relative", "rel_lo", "rel_hi", "p", "n_origins", "n_windows"]
        pd.testing.assert_frame_equal(mine[columns], theirs.loc[mine.index, columns])


def test_a_worse_default_is_called_worse():
    assert (c.evaluate_claims(losses_of(**USUAL | dict(har_ensemble=1.1)), n_boot=50).verdict == "worse").all()


def test_another_default_can_be_tested(losses):
    claims = c.evaluate_claims(losses.replace("har_ensemble", "mine"), default="mine", n_boot=50)
    assert (claims.default == "mine").all() and (claims.verdict == "better").all()


@pytest.mark.parametrize("absent, not_run", [("climatology_4y", 3), ("log_har", 2), ("har_ensemble", 5)])
def test_an_absent_model_is_not_run_and_does_not_help_the_other_claims(losses, absent, not_run):
    claims = c.evaluate_claims(losses[losses.model != absent], n_boot=50)
    missing = claims[claims.verdict == "not run"]
    assert len(missing) == not_run and missing[["diff", "relative", "rel_lo", "p", "p_holm"]].isna().all(axis=None)
    assert (missing.n_origins == 0).all()
    rest = claims[claims.verdict != "not run"]
    if len(rest): assert_allclose(rest.p_holm.min(), 5 * rest.p.min())


def test_an_absent_loss_is_not_run(losses):
    verdicts = c.evaluate_claims(losses.drop(columns="qlike"), n_boot=50).set_index("score").verdict
    assert verdicts["qlike"] == "not run" and verdicts["rmse_log_sigma"] == "better"


def test_models_without_common_origins_are_not_run(losses):
    apart = losses[(losses.model != "log_har") | (losses.time < TIMES[500])]
    apart = apart[(apart.model != "har_ensemble") | (apart.time >= TIMES[500])]
    assert (c.evaluate_claims(apart, n_boot=50).verdict[3:] == "not run").all()


def test_identical_losses_are_called_identical(losses):
    log_har = losses[losses.model == "log_har"]
    same = pd.concat([losses[losses.model == "climatology_4y"], log_har, log_har.assign(model="har_ensemble")])
    claims = c.evaluate_claims(same, n_boot=50)
    assert (claims.verdict[3:] == "identical").all() and (claims.relative[3:] == 0).all() and claims.p_holm[3:].isna().all()


def test_few_origins_and_infinite_losses_are_not_testable(losses):
    short = c.evaluate_claims(losses[losses.time < TIMES[40]], n_boot=50)
    assert (short.verdict == "not testable").all() and (short.n_origins == 40).all()
    infinite = losses.assign(log_loss=losses.log_loss.mask((losses.model == "har_ensemble") & (losses.time == TIMES[3]), np.inf))
    assert c.evaluate_claims(infinite, n_boot=50).verdict.tolist()[:2] == ["not testable", "better"]


def test_widening_keeps_means_and_order():
    x = overlapping_noise(540, 90, 3, seed=2).T
    wide = c.widened_losses(x, 90, .1)
    assert_allclose(wide.mean(axis=0), x.mean(axis=0))
    factor = wide.std(axis=0) / x.std(axis=0)
    assert_allclose(factor, factor[0])
    assert factor[0] > c.widened_losses(x, 10, .1).std() / x.std() >= 1, "the fewer the windows, the wider"


@pytest.fixture(scope="module")
def sets(losses) -> pd.DataFrame:
    "Confidence sets of the losses with a fourth model, whose volatility losses are the default's."
    pytest.importorskip("arch")
    mine = losses_of(seed=50, mamba2=1.0)
    for loss in ("se_log_sigma", "qlike"): mine[loss] = losses.loc[losses.model == "har_ensemble", loss].to_numpy()
    return c.confidence_sets(pd.concat([losses, mine]), n_boot=200)


def test_the_set_holds_the_clearly_best_model_and_spa_finds_it(sets):
    assert sets.groupby("score").size().eq(4).all() and sets.score.nunique() == 5
    best = sets.groupby("score").first()
    assert (best.model == "har_ensemble").all() and (best.p_mcs == 1).all() and best.in_set.all()
    assert (sets.p_spa <= .05).all() and not sets.query("model in ['log_har', 'climatology_4y']").in_set.any()
    assert sets.p_mcs.min() == 1 / 200, "no p-value is below the resolution"


def test_blocks_are_twice_the_label(sets):
    blocks = dict(log_loss=180, pinball10=180, pinball90=180, qlike=60, rmse_log_sigma=60)
    assert sets.groupby("score").block.first().to_dict() == blocks


def test_a_model_that_repeats_another_shares_its_p_value(sets):
    twins = sets[sets.note != ""]
    assert (twins.model == "mamba2").all() and sorted(twins.score) == ["qlike", "rmse_log_sigma"]
    assert (twins.note == "same losses as har_ensemble").all() and (twins.p_mcs == 1).all() and twins.in_set.all()


def test_sets_depend_on_the_seed_alone():
    pytest.importorskip("arch")
    equal = losses_of(**dict.fromkeys(USUAL, 1.))
    a, b, other = (c.confidence_sets(equal, n_boot=50, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(a, b)
    assert not a.equals(other)


def test_only_common_origins_count(losses):
    pytest.importorskip("arch")
    late = losses[(losses.model != "log_har") | (losses.time >= TIMES[100])]
    sets, expected = c.confidence_sets(late, n_boot=50), c.confidence_sets(losses[losses.time >= TIMES[100]], n_boot=50)
    assert (sets.n_origins == N - 100).all()
    pd.testing.assert_frame_equal(sets, expected)


def test_infinite_losses_leave_a_model_out_of_the_tests(losses):
    pytest.importorskip("arch")
    zero = losses[losses.model == "har_ensemble"].assign(model="zero", log_loss=np.inf)
    sets = c.confidence_sets(pd.concat([losses, zero]), n_boot=50).query("score == 'log_loss'").set_index("model")
    out = sets.loc["zero"]
    assert out.note == "infinite losses" and np.isnan(out.p_mcs) and not out.in_set
    assert sets.drop("zero").p_mcs.notna().all() and sets.p_spa.notna().all()


def test_without_the_reference_there_is_a_set_but_no_spa(losses):
    pytest.importorskip("arch")
    sets = c.confidence_sets(losses[losses.model != "log_har"], n_boot=50).set_index("score")
    assert sets.loc["qlike", "p_spa"].isna().all() and sets.loc["qlike", "p_mcs"].notna().all()
    assert sets.loc["log_loss", "p_spa"].notna().all()


@pytest.mark.parametrize("origins, models", [(40, 3), (600, 3), (N, 1)], ids=["no window", "few windows", "one model"])
def test_what_cannot_be_tested_is_nan(losses, origins, models):
    pytest.importorskip("arch")
    some = losses[(losses.time < TIMES[origins - 1]) & losses.model.isin(list(USUAL)[:models])]
    returns = c.confidence_sets(some, n_boot=50).query("score in ['log_loss', 'pinball10']")
    assert len(returns) == 2 * models and returns[["p_mcs", "p_spa"]].isna().all(axis=None) and not returns.in_set.any()


def test_models_without_common_origins_have_no_twins(losses):
    pytest.importorskip("arch")
    apart = losses[(losses.model == "log_har") == (losses.time < TIMES[500])]
    sets = c.confidence_sets(apart, n_boot=50)
    assert len(sets) == 15 and (sets.n_origins == 0).all() and (sets.note == "").all() and sets.p_mcs.isna().all()


def test_the_default_is_named_before_the_model_that_repeats_it(losses):
    pytest.importorskip("arch")
    copy = losses[losses.model == "har_ensemble"].assign(model="a network")
    notes = c.confidence_sets(pd.concat([copy, losses]), n_boot=50).groupby("model").note.unique()
    assert list(notes["a network"]) == ["same losses as har_ensemble"] and list(notes["har_ensemble"]) == [""]


def test_no_p_values_if_all_models_equal_the_reference(losses):
    pytest.importorskip("arch")
    one = losses[losses.model == "log_har"]
    sets = c.confidence_sets(pd.concat([one, one.assign(model="copy")]), n_boot=50).query("score == 'qlike'")
    assert sets.p_mcs.isna().all() and sets.p_spa.isna().all()
    assert sets.set_index("model").note.to_dict() == dict(log_har="", copy="same losses as log_har")


def test_spa_is_studentised():
    "A volatile third model does not hide that the second is better than the first."
    pytest.importorskip("arch")
    x = overlapping_noise(N, 30, 3, seed=4).T / np.sqrt(30)
    x[:, 1] -= 1
    volatile = x * [1, 1, 30]
    assert c.mcs_and_spa(volatile, 60, 300, 0)[1] < .03
    assert block_standard_error((volatile[:, 2] - volatile[:, 0]), 60) > 3, "its difference is larger than the effect"


def test_without_arch_the_frame_is_empty_and_names_the_remedy(losses, monkeypatch):
    monkeypatch.setitem(sys.modules, "arch", None)
    sets = c.confidence_sets(losses)
    assert len(sets) == 0 and {"score", "model", "p_mcs", "p_spa"} <= set(sets.columns)
    assert sets.attrs["note"] == ("model confidence set and SPA need the package arch: "
                                  "pip install cryptopredict[baselines]")
