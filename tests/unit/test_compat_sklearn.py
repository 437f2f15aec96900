"""The estimators: scikit-learn's own checks, pipelines and searches, and the core's answers behind them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import sbot

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sbot.compat.sklearn import BridgeClassifier, BridgeTransport


@parametrize_with_checks([BridgeTransport(), BridgeClassifier(), BridgeClassifier(LogisticRegression())])
@pytest.mark.filterwarnings("ignore")  # the checks provoke scikit-learn's own
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture
def domains():
    """Two classes, and the same turned and moved, where a classifier of the first is wrong."""
    draw = np.random.default_rng(0)
    y = np.repeat([0, 1], 60)
    X = draw.normal(size=(120, 2)) * 0.4 + np.where(y[:, None] == 1, [2.0, 0.0], [0.0, 0.0])
    turned = 1.2
    rotation = np.array([[math.cos(turned), math.sin(turned)], [-math.sin(turned), math.cos(turned)]])
    again = draw.normal(size=(120, 2)) * 0.4 + np.where(y[:, None] == 1, [2.0, 0.0], [0.0, 0.0])
    return X, y, again @ rotation + [1.5, 3.0]


def test_the_maps_are_the_core_s(domains):
    X, _, target = domains
    model = BridgeTransport(target=target, eps=0.1, tol=1e-10).fit(X)
    bridge = sbot.solve_bridge(X, target, 0.1, solver=sbot.Sinkhorn(tol=1e-10))
    new = X[:7] + 0.3
    np.testing.assert_allclose(model.transform(new), bridge.transport(new).numpy(), rtol=1e-7)
    plan = bridge.plan()
    back = (plan.T @ torch.from_numpy(X)) / plan.sum(0)[:, None]
    np.testing.assert_allclose(model.inverse_transform(target), back.numpy(), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.interpolate(new, 0.25), 0.75 * new + 0.25 * model.transform(new), rtol=1e-12)
    np.testing.assert_array_equal(model.interpolate(new, 0), new)
    np.testing.assert_array_equal(model.interpolate(new, 1), model.transform(new))
    assert model.eps_ == 0.1 and model.bridge_.report.converged and model.n_iter_ >= 1


def test_labels_travel_along_the_plan(domains):
    X, y, target = domains
    model = BridgeTransport(target=target, eps=0.1).fit(X)
    plan = model.bridge_.plan().numpy()
    want = np.stack([plan[y == c].sum(0) for c in (0, 1)], 1) / plan.sum(0)[:, None]
    np.testing.assert_allclose(model.transform_labels(y), want, rtol=1e-8)
    labels = BridgeClassifier(target=target, eps=0.1).fit(X, y)
    np.testing.assert_allclose(labels.predict_proba(target), want, rtol=1e-6, atol=1e-9)
    assert labels.predict_proba(target + 0.01).shape == (120, 2)


@pytest.mark.parametrize("t", [0.5, 1.0])
def test_draws_have_the_law_of_the_bridge(domains, t):
    X, _, target = domains
    model = BridgeTransport(target=target, eps=0.5).fit(X)
    point = np.repeat(X[:1], 4000, 0)
    draws = model.sample(point, t, random_state=0)
    np.testing.assert_array_equal(draws, model.sample(point, t, random_state=0))
    law = model.bridge_.condition(torch.from_numpy(X[:1]))
    w = law.weights[0].numpy()
    mean, second = w @ target, (w @ target**2) - (w @ target) ** 2
    scale = np.sqrt(t**2 * second + 0.5 * t * (1 - t))
    np.testing.assert_array_less(np.abs(draws.mean(0) - (1 - t) * X[0] - t * mean), 4 * scale / math.sqrt(4000))
    np.testing.assert_allclose(draws.std(0), scale, rtol=0.05)
    np.testing.assert_array_equal(model.sample(X, 0), X)


def test_the_normal_law_is_the_default_target(domains):
    X, _, _ = domains
    model = BridgeTransport().fit(X)
    moved = model.transform(X)
    assert float(np.abs(moved.mean(0)).max()) < 0.02
    assert np.abs(np.cov(moved.T) - np.eye(2)).max() < 0.35  # the mean of a conditional law varies less than the law
    np.testing.assert_array_equal(moved, clone(model).fit(X).transform(X))


def test_relaxed_marginals_and_other_costs(domains):
    X, _, target = domains
    outlier = np.vstack([target, [[9.0, 9.0]]])
    hard = BridgeTransport(target=outlier, eps=0.1).fit_transform(X)
    loose = BridgeTransport(target=outlier, eps=0.1, relax=1.0).fit_transform(X)
    assert hard.max() > 6.0 > loose.max()
    distance = BridgeTransport(target=target, cost=sbot.Lp(2), eps=0.1).fit(X)
    assert distance.transform(X[:3]).shape == distance.inverse_transform(X[:3]).shape == (3, 2)
    with pytest.raises(sbot.Unsupported, match="cost=None"):
        distance.interpolate(X, 0.5)


def test_eps_auto_is_a_twentieth_of_the_spread(domains):
    X, _, target = domains
    c = ((X[:, None] - target) ** 2).sum(-1) / 2
    assert BridgeTransport(target=target).fit(X).eps_ == pytest.approx(0.05 * c.std())
    moved = BridgeTransport(target=10 * target).fit(10 * X).transform(10 * X)
    np.testing.assert_allclose(moved, 10 * BridgeTransport(target=target).fit(X).transform(X), rtol=1e-5, atol=1e-6)


def test_weights_are_repetitions(domains):
    X, _, target = domains
    weights = np.arange(120) % 3
    weighted = BridgeTransport(target=target).fit(X, sample_weight=weights)
    repeated = BridgeTransport(target=target).fit(np.repeat(X, weights, 0))
    np.testing.assert_allclose(weighted.transform(X), repeated.transform(X), rtol=1e-5, atol=1e-6)


def test_a_pipeline_scales_both_domains(domains):
    X, y, _ = domains
    target = X[::-1] @ [[0.9, 0.3], [-0.3, 0.9]] + [0.0, 3.0]
    seen = y[::-1]
    both = np.vstack([X, target]) * [1.0, 100.0]
    labels, domain = np.hstack([y, np.full(120, -1)]), np.repeat([1, -1], 120)
    pipe = make_pipeline(StandardScaler(), BridgeClassifier())
    pipe.fit(both, labels, bridgeclassifier__sample_domain=domain)
    assert set(pipe.classes_) == {0, 1}
    assert pipe.score(target * [1.0, 100.0], seen) > 0.95
    moved = make_pipeline(StandardScaler(), BridgeTransport()).fit_transform(
        both, bridgetransport__sample_domain=domain
    )
    np.testing.assert_allclose(moved[120:], StandardScaler().fit_transform(both)[120:])
    assert np.abs(moved[:120].mean(0) - moved[120:].mean(0)).max() < 0.05


def test_grid_search_adapts_a_classifier(domains):
    X, y, target = domains
    plain = LogisticRegression().fit(X, y).score(target, y)
    # fitted on the labelled domain, scored on a few labelled points of the other
    known = slice(0, None, 10)
    table, labels = np.vstack([X, target[known]]), np.hstack([y, y[known]])
    search = GridSearchCV(
        BridgeClassifier(LogisticRegression(), target=target),
        {"eps": ["auto", 10.0], "estimator": [None, LogisticRegression()], "relax": [None, 5.0]},
        cv=[(np.arange(120), np.arange(120, len(table)))],
        refit=False,
        error_score="raise",
    ).fit(table, labels)
    best = BridgeClassifier(target=target).set_params(**search.best_params_).fit(X, y)
    assert plain < 0.9 < best.score(target, y)


def test_data_frames(domains):
    pandas = pytest.importorskip("pandas")
    X, _, target = domains
    frame = pandas.DataFrame(X, columns=["height", "width"])
    model = BridgeTransport(target=target).set_output(transform="pandas").fit(frame)
    assert list(model.transform(frame).columns) == list(model.get_feature_names_out()) == ["height", "width"]


@pytest.mark.parametrize(
    ("options", "fit"),
    [
        ({"target": "uniform"}, {}),
        ({"target": np.zeros((4, 3))}, {}),
        ({"eps": 0}, {}),
        ({"eps": "small"}, {}),
        ({"relax": -1}, {}),
        ({"tol": -1.0}, {}),
        ({}, {"sample_domain": np.ones(120)}),
        ({}, {"sample_domain": np.ones(3)}),
        ({"target": np.zeros((4, 2))}, {"sample_domain": np.repeat([1, -1], 60)}),
        ({"target": np.zeros((0, 2))}, {}),
        ({}, {"sample_weight": np.full(120, -1.0)}),
    ],
    ids=str,
)
def test_bad_input(domains, options, fit):
    with pytest.raises(ValueError, match=r"give|tol|minimum"):
        BridgeTransport(**options).fit(domains[0], **fit)


def test_before_and_after_the_interval(domains):
    with pytest.raises(NotFittedError):
        BridgeTransport().transform(domains[0])
    model = BridgeTransport(target=domains[2]).fit(domains[0])
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            model.interpolate(domains[0], t)


def test_without_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "try: import sbot.compat.sklearn\n"
        "except ImportError as error: print('pip install' in str(error))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
