"""Estimators for scikit-learn: entropic transport of features and of labels, in pipelines and searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import solve_bridge
from ..arrays import as_number
from ..bridge import Bridge
from ..errors import InvalidProblem, Unsupported
from ..linalg import full_precision
from ..potential_bridge import PotentialBridge
from ..potentials import Atoms
from ..reference import LinearReference
from ..solvers import Sinkhorn

try:
    from sklearn.base import (
        BaseEstimator,
        ClassifierMixin,
        OneToOneFeatureMixin,
        TransformerMixin,
        clone,
    )
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted, column_or_1d, validate_data
except ImportError as missing:
    raise ImportError("sbot.compat.sklearn needs scikit-learn >= 1.6: pip install 'scikit-learn>=1.6'") from missing

#: Points that stand for the standard normal law.
NORMAL = 512


class _Transporting(BaseEstimator):  # type: ignore[misc]
    """What the estimators share: from their parameters to a bridge from X to the target."""

    def _target(self, X: np.ndarray, sample_domain: Any) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of X are the source, and the points of the target."""
        source = np.ones(len(X), dtype=bool)
        if sample_domain is not None:
            if not _is_default(self.target):
                raise InvalidProblem("the target is given twice; give target= or sample_domain=")
            domain = check_array(sample_domain, ensure_2d=False)
            if domain.shape != (len(X),):
                raise InvalidProblem(f"sample_domain has shape {domain.shape}; give {(len(X),)}")
            source = domain >= 0
            if source.all() or not source.any():
                raise InvalidProblem("sample_domain has one domain only; give >= 0 for the source, < 0 for the target")
            return source, X[~source]
        return source, self._fixed_target(X)

    def _fixed_target(self, X: np.ndarray) -> np.ndarray:
        target = check_array(self.target, dtype=X.dtype, input_name="target")
        if target.shape[1] != X.shape[1]:
            raise InvalidProblem(f"target has {target.shape[1]} features and X {X.shape[1]}; give points of one space")
        return target

    def _fit_bridge(self, X: np.ndarray, weights: np.ndarray | None, target: np.ndarray) -> None:
        x, nu = _tensor(X), _tensor(target)
        a = None if weights is None else _tensor(weights / weights.sum())
        mu = x if a is None else (x, a)
        solver = Sinkhorn(tol=self.tol, max_iter=self.max_iter)
        # all in one place: the cost has no scale, and the plan is the same at any eps
        nowhere = isinstance(self.eps, str) and bool((x == x[0]).all()) and bool((nu == x[0]).all())
        eps = 1.0 if nowhere and self.eps == "auto" else self.eps
        self.bridge_: Bridge = solve_bridge(mu, nu, eps, cost=self.cost, relax=self.relax, solver=solver)
        self.eps_ = self.bridge_.problem.eps
        self.n_iter_ = max(1, self.bridge_.report.iterations)

    def _points(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "bridge_")
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if tags.transformer_tags is not None:
            tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class BridgeTransport(OneToOneFeatureMixin, TransformerMixin, _Transporting):  # type: ignore[misc]
    r"""Move points from the law of X to another, by the entropic map ``E[X_1 | X_0 = x]`` of a Schrödinger bridge.

    .. math:: \min_P \langle P, C\rangle + \varepsilon\, KL(P \,|\, \mu\otimes\nu)

    with mu the rows of X and nu those of the target.  The map is known at every point, through the dual potentials, and not
    only at those that were fitted.

    Parameters
    ----------
    target : points ``(m, d)``, or "normal": the standard normal law, as in ``QuantileTransformer``, in all dimensions at once.
        A target that goes through the same pipeline as X is given to `fit`, in X, by ``sample_domain``.
    eps : variance of the path, in the units of the cost; "auto" is a twentieth of the standard deviation of the cost.
    cost : None for ``|x - y|^2 / 2``, a `Cost` of sbot, or a function of two clouds of tensors.
    relax : None for hard marginals, ``rho`` or ``(rho_mu, rho_nu)``: marginals are then only encouraged, by ``rho KL``.
    tol, max_iter : see `Sinkhorn`.

    Attributes
    ----------
    bridge_ : the bridge itself, with plan, drift, densities and report.
    eps_ : the eps that was used.
    n_iter_ : iterations that were taken.
    n_features_in_, feature_names_in_ : as in scikit-learn.

    Examples
    --------
    >>> import numpy as np
    >>> from sbot.compat.sklearn import BridgeTransport
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> moved = BridgeTransport(target=X + [3, 0]).fit_transform(X)
    >>> np.allclose(moved.mean(0), X.mean(0) + [3, 0], atol=1e-6)
    True
    """

    def __init__(
        self,
        target: Any = "normal",
        *,
        eps: float | str = "auto",
        cost: Any = None,
        relax: Any = None,
        tol: float | None = None,
        max_iter: int = 10_000,
    ) -> None:
        self.target = target
        self.eps = eps
        self.cost = cost
        self.relax = relax
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any = None, *, sample_weight: Any = None, sample_domain: Any = None) -> BridgeTransport:
        """Solve the bridge from the rows of X to the target.

        Parameters
        ----------
        X : ``(n, d)``.
        y : not used.
        sample_weight : ``(n,)``, the weights of the rows.
        sample_domain : ``(n,)``, as in skada: rows with a number >= 0 are the source, those with one < 0 the target.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        source, target = self._target(X, sample_domain)
        if weights is not None:
            if sample_domain is not None:
                raise Unsupported("sample_weight together with sample_domain; give the target as target=")
            if not (weights >= 0).all() or weights.sum() == 0:
                raise InvalidProblem("sample_weight has negative entries or none that is positive; give weights >= 0")
            weights = weights.astype(X.dtype)
        self._fit_bridge(X[source], weights, target)
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """`fit`, then `transform`; with ``sample_domain`` the source is moved and the target stays where it is."""
        domain = fit_params.get("sample_domain")
        if domain is None:
            return super().fit_transform(X, y, **fit_params)
        self.fit(X, y, **fit_params)
        moved = self.transform(X)
        stay = np.asarray(domain) < 0
        if hasattr(moved, "loc"):
            moved.loc[stay, :] = np.asarray(X)[stay]
        else:
            moved[stay] = np.asarray(X)[stay]
        return moved

    def transform(self, X: Any) -> Any:
        """``E[X_1 | X_0 = x]`` of each row."""
        return _array(self._bridge().transport(_tensor(self._points(X))))

    def inverse_transform(self, X: Any) -> Any:
        """``E[X_0 | X_1 = y]`` of each row: the map of the bridge run backwards, not the inverse of a function."""
        return _array(_behind(self._bridge(), _tensor(self._points(X))))

    def interpolate(self, X: Any, t: float) -> Any:
        """``E[X_t | X_0 = x]``, between the rows at t = 0 and `transform` of them at t = 1."""
        bridge = self._bridge()
        points, time = _tensor(self._points(X)), _time(t)
        if time == 0:
            return _array(points)
        end = bridge.transport(points)
        if time == 1:
            return _array(end)
        law = _process(bridge).pin(0.0, time)
        return _array(law.near.to(points) * points + law.far.to(points) * end + law.shift.to(points))

    def sample(self, X: Any, t: float = 1.0, *, random_state: Any = None) -> Any:
        """A draw of ``X_t`` given ``X_0 = x`` for each row: the noise that the mean of `transform` averages out."""
        bridge = self._bridge()
        points, time = _tensor(self._points(X)), _time(t)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        if time == 0:
            return _array(points)
        end = bridge.condition(points).sample(generator=generator)
        if time == 1:
            return _array(end)
        law = _process(bridge).pin(0.0, time)
        return _array(law.sample(points, end, bridge.problem.eps, generator=generator))

    def transform_labels(self, y: Any) -> np.ndarray:
        """What share of each class arrives at each atom of the target, ``(m, n_classes)``, from labels of the source."""
        check_is_fitted(self, "bridge_")
        labels = column_or_1d(y)
        mass = self.bridge_.apply(_codes(labels, np.float64)[1], transpose=True)
        return (mass / mass.sum(-1, keepdim=True)).numpy()

    def _bridge(self) -> PotentialBridge:
        check_is_fitted(self, "bridge_")
        assert isinstance(self.bridge_, PotentialBridge)
        return self.bridge_

    def _fixed_target(self, X: np.ndarray) -> np.ndarray:
        if isinstance(self.target, str):
            if self.target != "normal":
                raise InvalidProblem(f"target is {self.target!r}; give points (m, d), or 'normal'")
            return _normal(X.shape[1]).astype(X.dtype)
        return super()._fixed_target(X)


class BridgeClassifier(ClassifierMixin, _Transporting):  # type: ignore[misc]
    r"""Classify a domain without labels by transport from one that has them.

    With ``estimator=None`` the labels travel along the plan: at a point y of the target

    .. math:: p(c \,|\, y) = \sum_i P(x_i \,|\, y)\, [c_i = c].

    With an estimator, the labelled points travel along the entropic map, and the estimator is fitted where they arrive.

    Parameters
    ----------
    estimator : None, or a classifier or a pipeline.
    target : points ``(m, d)`` of the target domain, without labels; None where `fit` is told by ``sample_domain``, or to adapt
        to nothing: the bridge is then from X to itself.
    eps, cost, relax, tol, max_iter : see `BridgeTransport`.

    Attributes
    ----------
    bridge_, eps_, n_iter_ : see `BridgeTransport`.
    estimator_ : the fitted estimator, where there is one.
    classes_ : the labels.

    Examples
    --------
    >>> import numpy as np
    >>> from sbot.compat.sklearn import BridgeClassifier
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> y = (X[:, 0] > 0).astype(int)
    >>> shifted = X + [3, 1]
    >>> float(BridgeClassifier(target=shifted).fit(X, y).score(shifted, y)) > 0.9
    True
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        target: Any = None,
        eps: float | str = "auto",
        cost: Any = None,
        relax: Any = None,
        tol: float | None = None,
        max_iter: int = 10_000,
    ) -> None:
        self.estimator = estimator
        self.target = target
        self.eps = eps
        self.cost = cost
        self.relax = relax
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, *, sample_domain: Any = None) -> BridgeClassifier:
        """Solve the bridge from the labelled rows to the target, and learn where they arrive.

        ``sample_domain`` ``(n,)``: rows with a number >= 0 are labelled, those with one < 0 are the target, and their entry of y
        is not looked at.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        source, target = self._target(X, sample_domain)
        self.classes_, self._codes = _codes(y[source], X.dtype)
        self._fit_bridge(X[source], None, target)
        if self.estimator is not None:
            moved = _array(self.bridge_.transport())
            self.estimator_ = clone(self.estimator).fit(moved, y[source])
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class at each row, a point of the target."""
        points = self._points(X)
        if self.estimator is not None:
            return self.estimator_.predict_proba(points)
        shares = _behind(self.bridge_, _tensor(points), self._codes)
        return _array(shares / shares.sum(-1, keepdim=True))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, a point of the target."""
        points = self._points(X)
        if self.estimator is not None:
            return self.estimator_.predict(points)
        return self.classes_[self.predict_proba(points).argmax(1)]

    def _fixed_target(self, X: np.ndarray) -> np.ndarray:
        return X if self.target is None else super()._fixed_target(X)


# ---- arrays and parts of a bridge ----------------------------------------------------------------------------------


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _is_default(target: Any) -> bool:
    return target is None or (isinstance(target, str) and target == "normal")


def _time(t: Any) -> float:
    time = as_number(t, "t")
    if not 0 <= time <= 1:
        raise InvalidProblem(f"t is {time}; times lie in [0, 1]")
    return time


def _process(bridge: Bridge) -> LinearReference:
    reference = bridge.problem.reference
    if not isinstance(reference, LinearReference):
        raise Unsupported("a cost knows only the two ends; leave cost=None for points in between")
    return reference


def _behind(bridge: Bridge, y: Tensor, values: Tensor | None = None) -> Tensor:
    """``E[X_0 | X_1 = y]``, or of ``values`` ``(n, k)`` that the atoms of mu carry."""
    assert isinstance(bridge, PotentialBridge) and isinstance(bridge.phi, Atoms)
    phi = bridge.phi if values is None else Atoms(bridge.phi.points, bridge.phi.log_weights, values)
    problem = bridge.problem
    with full_precision():
        return problem.reference.push_forward(phi, 1.0, y.to(problem.dtype), problem.eps)[0].mean


def _codes(y: np.ndarray, dtype: Any) -> tuple[np.ndarray, Tensor]:
    """The labels, and which row has which."""
    classes, code = np.unique(y, return_inverse=True)
    return classes, torch.from_numpy(np.eye(len(classes), dtype=dtype)[code])


def _normal(d: int) -> np.ndarray:
    """Points that fill the standard normal law evenly: Sobol's, through the quantile function."""
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=0)  # type: ignore[no-untyped-call]
    even = engine.draw(NORMAL, dtype=torch.float64)
    edge = 0.5 / NORMAL
    points: np.ndarray = torch.special.ndtri(even.clamp(edge, 1 - edge)).numpy()
    return points
