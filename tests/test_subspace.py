"""Subspaces and spectra: against a dense SVD, scipy, numbers by hand, and searches by brute force."""

import math
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from trl_sharelora import subspace
from trl_sharelora.errors import SubspaceError
from trl_sharelora.subspace import (
    approximation_errors,
    best_rank_k,
    concentrability,
    corollary_4_1,
    corollary_b_1,
    davis_kahan_bound,
    distance,
    log_bracketing,
    orthonormal,
    parameter_count,
    personal_spectrum,
    principal_angles,
    reward_difference_error,
    rotation_null,
    samples_needed,
    spectrum,
    spectrum_shared,
    theorem_4_1,
    theorem_4_2,
    uniform_concentration,
    zeta,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(updates):
    """The aggregate `(d1, N d2)`, formed."""
    return torch.cat(list(updates), dim=1)


def low_rank(n_users, d1, d2, k, seed=0, tail=0.0):
    """Updates of one common column space of k dimensions, and a tail outside it."""
    basis = torch.linalg.qr(normal(d1, k, seed=seed)).Q
    return basis @ normal(n_users, k, d2, seed=seed + 1) + tail * normal(n_users, d1, d2, seed=seed + 2)


def projector(basis):
    return basis @ basis.mT


# d1 < N d2, d1 > N d2, more columns than are held at a time, one row, one column
SHAPES = [(5, 7, 3), (2, 9, 3), (700, 4, 3), (3, 1, 5), (4, 6, 1), (2, 3, 1500), (1, 8, 8)]


# -- spectrum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectrum_is_the_svd_of_the_formed_aggregate(shape):
    updates = normal(*shape)
    basis, values, _ = torch.linalg.svd(dense(updates), full_matrices=False)
    found = spectrum(updates)
    assert found.n_users == shape[0] and found.rank == len(values)
    torch.testing.assert_close(found.singular_values, values, rtol=1e-12, atol=0)
    assert found.basis.shape == basis.shape
    torch.testing.assert_close(found.basis.mT @ found.basis, torch.eye(len(values), dtype=torch.float64))
    for k in (1, len(values)):
        torch.testing.assert_close(projector(found.leading(k)), projector(basis[:, :k]), rtol=0, atol=1e-10)
        assert found.nu(k) == pytest.approx(float(values[k - 1]) ** 2 / shape[0], rel=1e-12)
        assert found.sigma_tail(k) == pytest.approx(float((values[k:] ** 2).sum()), rel=1e-12, abs=1e-12)
        assert found.explained(k) == pytest.approx(float((values[:k] ** 2).sum() / (values**2).sum()), rel=1e-12)


def test_spectrum_by_hand():
    # [[3, 0 | 0, 0], [0, 1 | 2, 0]]: rows of length 3 and sqrt 5, at right angles
    found = spectrum([torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])])
    assert found.singular_values.tolist() == pytest.approx([3, math.sqrt(5)])
    assert found.basis.abs().flatten().tolist() == pytest.approx([1, 0, 0, 1])
    assert found.explained(1) == pytest.approx(9 / 14) and found.explained(2) == pytest.approx(1)
    assert found.nu(2) == pytest.approx(5 / 2) and found.sigma_tail(1) == pytest.approx(5)
    assert found.effective_rank == pytest.approx(14**2 / (81 + 25))
    # e1 and e1 + e2: the Gram matrix [[2, 1], [1, 1]] has the golden ratio's squares as eigenvalues
    golden = (1 + math.sqrt(5)) / 2
    found = spectrum([torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])])
    assert found.singular_values.tolist() == pytest.approx([golden, golden - 1])
    assert (found.basis[0] / found.basis[1]).abs().tolist() == pytest.approx([golden, golden - 1])


@settings(max_examples=60, deadline=None)
@given(
    n_users=st.integers(1, 5),
    d1=st.integers(1, 7),
    d2=st.integers(1, 7),
    r=st.integers(1, 5),
    shared=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_factors_one_at_a_time_are_the_formed_products(n_users, d1, d2, r, shared, seed):
    ups, downs = normal(n_users, d1, r, seed=seed), normal(n_users, r, d2, seed=seed + 1)
    if shared:
        ups = ups[:1].expand_as(ups)
    values = torch.linalg.svdvals(dense(ups @ downs))
    for given_as in (zip(ups, downs, strict=True), (up @ down for up, down in zip(ups, downs, strict=True))):
        found = spectrum(given_as)
        torch.testing.assert_close(found.singular_values, values, rtol=1e-9, atol=1e-12 * float(values[0]))
        frame = found.basis
        torch.testing.assert_close(frame.mT @ frame, torch.eye(frame.shape[1], dtype=torch.float64))
        # the basis holds the updates, and its directions have the lengths that the singular values say
        torch.testing.assert_close(frame @ (frame.mT @ dense(ups @ downs)), dense(ups @ downs), rtol=0, atol=1e-10)
        lengths = (frame.mT @ dense(ups @ downs)).norm(dim=1)
        torch.testing.assert_close(lengths, values[: len(lengths)], rtol=1e-6, atol=1e-10 * float(values[0]))
    assert found.rank <= min(d1, n_users * d2, r if shared else n_users * r)


def test_users_who_leave_the_common_up_later_are_still_counted_right():
    up, other = normal(6, 2), normal(6, 3, seed=1)
    pairs = [(up, normal(2, 4, seed=n)) for n in range(3)] + [
        (other, normal(3, 4, seed=9)),
        (up, normal(2, 4, seed=5)),
    ]
    values = torch.linalg.svdvals(dense([up @ down for up, down in pairs]))
    torch.testing.assert_close(spectrum(pairs).singular_values, values, rtol=1e-12, atol=1e-12)
    assert spectrum(pairs[:3]).basis.shape == (6, 2) and spectrum(pairs[:3]).rank == 2
    # an equal copy of up is the same up
    copied = [(up.clone(), down) for up, down in pairs[:3]]
    assert spectrum(copied).basis.shape == (6, 2)
    mixed = [pairs[0], pairs[1][0] @ pairs[1][1], pairs[2]]
    torch.testing.assert_close(
        spectrum(mixed).singular_values, spectrum(pairs[:3]).singular_values, rtol=1e-12, atol=1e-12
    )


def test_small_singular_values_keep_their_digits_where_a_gram_matrix_loses_them():
    d1, wanted = 40, torch.logspace(0, -12, 40, dtype=torch.float64)
    left = torch.linalg.qr(normal(d1, d1)).Q
    right = torch.linalg.qr(normal(4000, d1, seed=1)).Q
    aggregate = left * wanted @ right.mT
    # 400 users, so that columns are folded several times
    found = spectrum(aggregate.split(10, dim=1))
    torch.testing.assert_close(found.singular_values, wanted, rtol=1e-2, atol=0)
    assert found.rank == d1
    gram = torch.linalg.eigvalsh(aggregate @ aggregate.mT).flip(0).clamp_min(0).sqrt()
    assert float((gram[-1] / wanted[-1] - 1).abs()) > 0.9  # what the test is about


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numerical_rank_of_a_common_space(dtype):
    exact = low_rank(30, 12, 5, k=3)
    assert spectrum(exact, dtype=dtype).rank == 3
    # rounded to float32, the aggregate has full rank on paper and rank 3 within its precision
    assert spectrum(exact.float(), dtype=dtype).rank == 3
    assert spectrum(low_rank(30, 12, 5, k=3, tail=1e-3), dtype=dtype).rank == 12
    found = spectrum(exact, dtype=dtype)
    assert found.singular_values.dtype == dtype and found.basis.dtype == dtype
    limit = 16 * math.sqrt(12) * torch.finfo(dtype).eps
    assert found.tolerance == pytest.approx(limit)


STREAM = """
import resource, sys, torch
from trl_sharelora.subspace import spectrum

torch.set_num_threads(1)
def users(n, generator):
    for _ in range(n):
        yield torch.randn(32, 64, generator=generator)
spectrum(users(200, torch.Generator().manual_seed(0)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = spectrum(users(20_000, torch.Generator().manual_seed(0)))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown, found.n_users, float(found.singular_values.square().sum()), found.explained(1))
"""


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="no resource usage here")
def test_twenty_thousand_users_are_never_held_together():
    run = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, check=True)
    grown, n_users, squares, explained = run.stdout.split()
    # their 1,280,000 columns are 164 MB in float32, 328 MB in float64
    assert int(grown) < 16 * 1024  # KiB
    assert int(n_users) == 20_000
    assert float(squares) == pytest.approx(20_000 * 32 * 64, rel=0.01)
    assert float(explained) == pytest.approx(1 / 32, rel=0.02)


def test_a_buffer_that_is_written_again_does_not_change_what_was_read():
    updates = normal(6, 5, 3)

    def reusing():
        buffer = torch.empty(5, 3, dtype=torch.float64)
        for update in updates:
            buffer.copy_(update)
            yield buffer

    torch.testing.assert_close(spectrum(reusing()).singular_values, spectrum(updates).singular_values)


def test_ties_are_said():
    # two users, each a direction of his own, equally strong; a third weaker one
    users = [
        torch.diag(torch.tensor([2.0, 0, 0])),
        torch.diag(torch.tensor([0.0, 2, 0])),
        torch.diag(torch.tensor([0.0, 0, 1])),
    ]
    found = spectrum(users)
    assert [found.tied(k) for k in (1, 2, 3)] == [True, False, False]
    assert found.leading(1).shape == (3, 1) and found.nu(1) == pytest.approx(4 / 3)
    later = spectrum([torch.diag(torch.tensor([2.0, 1.0, 1.0]))])
    assert [later.tied(k) for k in (1, 2, 3)] == [False, True, False]
    nearly = spectrum([torch.diag(torch.tensor([1.0, 1 - 1e-4], dtype=torch.float64))])
    assert not nearly.tied(1) and nearly.tied(1, rtol=1e-3)


def test_directions_that_do_not_exist_are_refused():
    found = spectrum(low_rank(4, 6, 5, k=2))
    for call in (found.leading, found.nu, found.tied):
        with pytest.raises(SubspaceError, match=r"k=3 came, but the aggregate of 4 users has rank 2"):
            call(3)
    assert found.explained(3) == 1.0 and found.sigma_tail(9) == 0.0
    for wrong in (0, -1, 1.5, True):
        for call in (found.leading, found.nu, found.tied, found.explained, found.sigma_tail):
            with pytest.raises(SubspaceError, match=f"k={wrong!r} came"):
                call(wrong)
    zero = spectrum(torch.zeros(3, 4, 2))
    assert zero.rank == 0 and zero.effective_rank == 0
    with pytest.raises(SubspaceError, match="All updates are zero"):
        zero.explained(1)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([], "No users came"),
        (torch.zeros(0, 3, 2), "No users came"),
        (torch.zeros(3, 2), r"shape \(3, 2\) came; \(users, d1, d2\)"),
        (
            [torch.zeros(3, 2), torch.zeros(2, 3)],
            r"User 1 has an update of shape \(2, 3\), the users before him \(3, 2\)",
        ),
        ([(torch.zeros(3, 2), torch.zeros(3, 2))], r"factors of shape \(3, 2\), \(3, 2\)"),
        ([torch.zeros(3)], r"factors of shape \(3,\)"),
        ([torch.zeros(3, 0)], "none of them empty"),
        ([torch.ones(2, 2), torch.tensor([[1.0, math.nan], [0, 0]])], "update of user 1 has NaN"),
        ([(torch.ones(2, 1), torch.tensor([[math.inf, 0.0]]))], "update of user 0 has NaN or infinite"),
        ([torch.ones(2, 2, dtype=torch.int64)], "floating-point"),
        ([np.ones((2, 2))], "A ndarray came for a user"),
    ],
)
def test_what_is_no_aggregate_is_refused(updates, message):
    with pytest.raises(SubspaceError, match=message):
        spectrum(updates)


def test_other_types_than_float32_and_float64_are_refused():
    with pytest.raises(SubspaceError, match="bfloat16 came"):
        spectrum(torch.ones(1, 2, 2), dtype=torch.bfloat16)
    # but updates may come in any
    assert spectrum([torch.ones(2, 2, dtype=torch.bfloat16)]).singular_values[0] == pytest.approx(2)


def test_spectrum_shared_from_the_gram_of_the_downs():
    up, downs = normal(9, 3), normal(50, 3, 4, seed=1)
    gram = sum(down @ down.mT for down in downs)
    found, streamed = spectrum_shared(up, gram, 50), spectrum([(up, down) for down in downs])
    torch.testing.assert_close(found.singular_values, streamed.singular_values[:3])
    assert distance(found.leading(2), streamed.leading(2)) < 1e-12
    assert found.n_users == 50 and found.nu(3) == pytest.approx(streamed.nu(3))
    # one direction of the factor that nobody uses
    gram[:, 2] = gram[2] = 0
    assert spectrum_shared(up, gram, 50).rank == 2
    for wrong, message in (
        (gram[:2, :2], r"\(3, 3\) is needed"),
        (-gram, "no Gram matrix"),
        (gram + torch.triu(torch.ones(3, 3), 1), "no Gram matrix"),
        (gram * math.nan, "finite"),
    ):
        with pytest.raises(SubspaceError, match=message):
            spectrum_shared(up, wrong, 50)
    with pytest.raises(SubspaceError, match="n_users=0"):
        spectrum_shared(up, gram, 0)


# -- what is personal


@pytest.mark.parametrize("form", ["whole", "shared", "own"])
def test_personal_part_is_the_spectrum_about_the_mean(form):
    downs = normal(5, 2, 6) + 3 * normal(2, 6, seed=7)
    if form == "whole":
        updates = list(normal(5, 7, 2, seed=1) @ downs)
    else:
        ups = normal(5, 7, 2, seed=2)
        updates = [(ups[0 if form == "shared" else n], down) for n, down in enumerate(downs)]
    formed = [item if form == "whole" else item[0] @ item[1] for item in updates]
    mean = sum(formed) / 5
    values = torch.linalg.svdvals(dense([update - mean for update in formed]))
    whole = spectrum(updates)
    personal, common = personal_spectrum(updates, whole)
    found = personal.singular_values
    torch.testing.assert_close(found, values[: len(found)], rtol=1e-6, atol=1e-7 * float(values[0]))
    assert float((values[len(found) :] ** 2).sum()) < 1e-20
    squares = sum(float((update**2).sum()) for update in formed)
    assert common == pytest.approx(5 * float((mean**2).sum()) / squares, rel=1e-10)
    personal_squares = float((found**2).sum())
    assert personal_squares == pytest.approx((1 - common) * squares, rel=1e-10)
    k = 2
    expected = torch.linalg.svd(dense([update - mean for update in formed])).U[:, :k]
    torch.testing.assert_close(projector(personal.leading(k)), projector(expected), rtol=0, atol=1e-6)


def test_equal_users_have_nothing_personal_and_opposite_ones_nothing_common():
    update = normal(4, 3)
    whole = spectrum([update] * 3)
    personal, common = personal_spectrum([update] * 3, whole)
    assert common == pytest.approx(1) and personal.rank == 0
    opposite = [update, -update]
    personal, common = personal_spectrum(opposite, spectrum(opposite))
    assert common == pytest.approx(0, abs=1e-15) and personal.rank == 3


def test_personal_part_needs_the_same_updates_again():
    updates = normal(3, 4, 2)
    whole = spectrum(updates)
    once = iter(updates)
    list(once)
    for wrong in (once, updates[:2], 2 * updates):
        with pytest.raises(SubspaceError, match="Give the updates it was made from"):
            personal_spectrum(wrong, whole)
    with pytest.raises(SubspaceError, match="4 rows"):
        personal_spectrum(normal(3, 5, 2), whole)


# -- approximation


def test_best_rank_k_is_the_truncated_svd_and_its_errors_add_up_to_the_tail():
    updates = normal(4, 6, 3)
    left, values, right = torch.linalg.svd(dense(updates), full_matrices=False)
    for k in (1, 3, 6):
        truncated = torch.stack((left[:, :k] * values[:k] @ right[:k]).split(3, dim=1))
        torch.testing.assert_close(best_rank_k(updates, k), truncated, rtol=0, atol=1e-12)
        errors = approximation_errors(updates, spectrum(updates).leading(k))
        by_hand = [(a - b).square().sum() for a, b in zip(updates, truncated, strict=True)]
        torch.testing.assert_close(errors, torch.stack(by_hand), rtol=0, atol=1e-12)
        assert float(errors.sum()) == pytest.approx(spectrum(updates).sigma_tail(k), abs=1e-12)
    ups, downs = normal(4, 6, 2), normal(4, 2, 3, seed=3)
    pairs = list(zip(ups, downs, strict=True))
    torch.testing.assert_close(best_rank_k(pairs, 2), best_rank_k(ups @ downs, 2))
    basis = spectrum(pairs).leading(2)
    torch.testing.assert_close(approximation_errors(iter(pairs), basis), approximation_errors(ups @ downs, basis))


def test_no_other_basis_of_k_directions_holds_more():
    updates = normal(4, 6, 3)
    best = float(approximation_errors(updates, spectrum(updates).leading(2)).sum())
    others = [float(approximation_errors(updates, orthonormal(normal(6, 2, seed=n))).sum()) for n in range(200)]
    assert best < min(others)


def test_errors_ask_for_an_orthonormal_basis_of_the_same_rows():
    with pytest.raises(SubspaceError, match=r"basis of shape \(6, 2\) is not orthonormal"):
        approximation_errors(normal(2, 6, 3), normal(6, 2))
    with pytest.raises(SubspaceError, match=r"User 0 has an update of shape \(6, 3\) and the basis 5 rows"):
        approximation_errors(normal(2, 6, 3), torch.eye(5, 2))
    with pytest.raises(SubspaceError, match="No users"):
        approximation_errors([], torch.eye(5, 2))


# -- angles and distances


@settings(max_examples=60, deadline=None)
@given(d1=st.integers(1, 8), k_a=st.integers(1, 8), k_b=st.integers(1, 8), seed=st.integers(0, 2**20))
def test_principal_angles_are_scipys(d1, k_a, k_b, seed):
    a, b = normal(d1, min(k_a, d1), seed=seed), normal(d1, min(k_b, d1), seed=seed + 1)
    found = principal_angles(a, b)
    expected = np.sort(linalg.subspace_angles(a.numpy(), b.numpy()))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    torch.testing.assert_close(principal_angles(b, a), found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("angle", [1e-14, 1e-9, 1e-3, 0.7, math.pi / 4, 1.2, math.pi / 2])
def test_angles_by_hand_small_and_right_ones(angle):
    a = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0], [0, math.cos(angle)], [0, math.sin(angle)], [0, 0]], dtype=torch.float64)
    assert principal_angles(a, b).tolist() == pytest.approx([0, angle], rel=1e-9, abs=1e-15)
    assert distance(a, b) == pytest.approx(math.sin(angle), rel=1e-9)
    # a line and a plane: one angle
    assert principal_angles(b[:, 1:], a).tolist() == pytest.approx([angle], rel=1e-9, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(d1=st.integers(2, 8), k=st.integers(1, 7), seed=st.integers(0, 2**20))
def test_both_forms_of_definition_a1_and_the_angles_agree(d1, k, seed):
    k = min(k, d1 - 1)
    whole_a = torch.linalg.qr(normal(d1, d1, seed=seed)).Q
    whole_b = torch.linalg.qr(normal(d1, d1, seed=seed + 1)).Q
    a, b, beside_b = whole_a[:, :k], whole_b[:, :k], whole_b[:, k:]
    found = distance(a, b)
    assert found == pytest.approx(float((projector(a) - projector(b)).norm()) / math.sqrt(2), abs=1e-10)
    assert found == pytest.approx(float((a.mT @ beside_b).norm()), abs=1e-10)
    assert found == pytest.approx(float(principal_angles(a, b).sin().norm()), abs=1e-10)
    assert found == pytest.approx(distance(b, a), abs=1e-10)
    assert 0 <= found <= math.sqrt(k) + 1e-12
    # a matter of the spaces, not of their bases
    turn = torch.linalg.qr(normal(k, k, seed=seed + 2)).Q
    assert found == pytest.approx(distance(a @ turn, b), abs=1e-10)
    third = torch.linalg.qr(normal(d1, k, seed=seed + 3)).Q
    assert found <= distance(a, third) + distance(third, b) + 1e-12


def test_nearly_right_angles_keep_their_digits_too():
    missing = 1e-8
    a, b = (
        torch.eye(2, 1, dtype=torch.float64),
        torch.tensor([[math.sin(missing)], [math.cos(missing)]], dtype=torch.float64),
    )
    assert math.pi / 2 - principal_angles(a, b).item() == pytest.approx(missing, rel=1e-6)


def test_distance_ends():
    eye = torch.eye(6)
    assert distance(eye[:, :3], eye[:, :3]) == 0
    assert distance(eye[:, :3], eye[:, 3:]) == pytest.approx(math.sqrt(3))
    assert distance(eye[:, :3], eye[:, 2:5]) == pytest.approx(math.sqrt(2))


def test_what_has_no_distance_is_refused():
    eye = torch.eye(5)
    with pytest.raises(SubspaceError, match=r"\(5, 2\) and \(5, 3\) came"):
        distance(eye[:, :2], eye[:, :3])
    with pytest.raises(SubspaceError, match="basis_b of shape .* is not orthonormal"):
        distance(eye[:, :2], 2 * eye[:, :2])
    with pytest.raises(SubspaceError, match="finite"):
        distance(eye[:, :2] * math.nan, eye[:, :2])
    with pytest.raises(SubspaceError, match="5 and 4 rows"):
        principal_angles(eye[:, :2], torch.eye(4)[:, :2])


def test_orthonormal_spans_the_factor_and_refuses_dependent_columns():
    factor = normal(7, 3) * torch.tensor([1e-6, 1.0, 1e5])
    basis = orthonormal(factor)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(projector(basis) @ factor, factor)
    for wrong in (torch.zeros(4, 2), torch.ones(4, 2), normal(2, 3), factor[:, [0, 1, 0]]):
        with pytest.raises(SubspaceError, match="has rank"):
            orthonormal(wrong)


# -- Lemmas 5 and 8


@settings(max_examples=80, deadline=None)
@given(
    n_users=st.integers(1, 5),
    k=st.integers(1, 3),
    tail=st.sampled_from([0.0, 0.1, 1.0]),
    noise=st.sampled_from([1e-6, 1e-2, 0.3, 1.0, 10.0]),
    seed=st.integers(0, 2**20),
)
def test_lemma_5_holds_with_the_constants_we_name(n_users, k, tail, noise, seed):
    d1, d2 = 6, 4
    truth = low_rank(n_users, d1, d2, k, seed=seed, tail=tail)
    estimate = truth + noise * normal(n_users, d1, d2, seed=seed + 5)
    # an estimate of rank k, as a fit of the shared class: constant 1, whatever the truth's tail
    left, right = davis_kahan_bound(best_rank_k(estimate, k), truth, k)
    assert left <= right * (1 + 1e-9)
    if tail == 0:
        left, right = davis_kahan_bound(estimate, truth, k)
        assert left <= 4 * right * (1 + 1e-9)


def test_lemma_5_by_hand():
    # truth diag(2, 0); the estimate's line is turned by 45 degrees: dist² = 1/2, error 4 + 1 + 1 - 2*2 = 2, sigma_1² = 4
    truth = [torch.tensor([[2.0, 0], [0, 0]])]
    estimate = [torch.tensor([[1.0, 0], [1, 0]])]
    assert davis_kahan_bound(estimate, truth, 1) == pytest.approx((1 / 2, 2 / 4))


def test_without_a_gap_the_smallest_error_turns_the_leading_direction():
    truth = [torch.diag(torch.tensor([1.0, 1 - 1e-6], dtype=torch.float64))]
    estimate = [torch.diag(torch.tensor([1 - 1e-6, 1.0], dtype=torch.float64))]
    left, right = davis_kahan_bound(estimate, truth, 1)
    assert left == pytest.approx(1) and right < 1e-11


def test_lemma_5_refuses_other_users_and_ranks():
    with pytest.raises(SubspaceError, match="the same users and layer"):
        davis_kahan_bound(normal(3, 4, 2), normal(2, 4, 2), 1)
    with pytest.raises(SubspaceError, match="k=3 came"):
        davis_kahan_bound(normal(3, 4, 2), low_rank(3, 4, 2, k=2), 3)


# -- unrelated spaces


def test_the_null_has_the_distribution_of_unrelated_users():
    values = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    found = rotation_null(values, d1=7, k=6, draws=400, seed=1)
    assert found.shape == (400, 6)
    assert bool((found[:, 1:] >= found[:, :-1] - 1e-12).all())
    torch.testing.assert_close(found[:, 4:], torch.ones(400, 2, dtype=torch.float64))  # rank 5 in all
    # independently: whole users' updates with spaces from scipy's Haar measure
    by_scipy = []
    for draw in range(400):
        users = [
            torch.from_numpy(stats.ortho_group.rvs(7, random_state=1000 * draw + n)[:, :2]) * own.double()
            for n, own in enumerate(values)
        ]
        by_scipy.append([spectrum(users).explained(k) for k in range(1, 5)])
    by_scipy = np.array(by_scipy)
    for k in range(4):
        assert stats.ks_2samp(found[:, k].numpy(), by_scipy[:, k]).pvalue > 0.001
    assert torch.equal(found, rotation_null(values, d1=7, k=6, draws=400, seed=1))
    assert not torch.equal(found, rotation_null(values, d1=7, k=6, draws=400, seed=2))


@pytest.mark.parametrize("at_a_time", [1, 2**26])
def test_the_null_where_the_answer_is_known(at_a_time, monkeypatch):
    monkeypatch.setattr(subspace, "_CHUNK", at_a_time)
    # two lines in a plane: the larger share is (1 + |cos|) / 2 with a uniform angle, whose mean is 1/2 + 1/pi
    found = rotation_null(torch.ones(2, 1), d1=2, k=1, draws=4000)
    assert float(found.mean()) == pytest.approx(0.5 + 1 / math.pi, abs=3 * float(found.std()) / math.sqrt(4000))
    # users who fill the space leave nothing to chance; one user explains himself
    torch.testing.assert_close(
        rotation_null(torch.ones(5, 3), d1=3, k=3, draws=3)[:, 0], torch.full((3,), 1 / 3, dtype=torch.float64)
    )
    assert rotation_null(torch.tensor([[2.0, 1.0]]), d1=9, k=1, draws=2).flatten().tolist() == pytest.approx(
        [0.8, 0.8]
    )


@pytest.mark.parametrize(
    ("values", "settings_", "message"),
    [
        (torch.ones(2, 4), {"d1": 3, "k": 1}, "at most d1 per user"),
        (torch.zeros(2, 1), {"d1": 3, "k": 1}, "not all zero"),
        (-torch.ones(2, 1), {"d1": 3, "k": 1}, "none negative"),
        (torch.ones(2, 1), {"d1": 3, "k": 0}, "k=0"),
        (torch.ones(2, 1), {"d1": 3, "k": 1, "draws": 0}, "draws=0"),
        (torch.ones(2, 1) * math.nan, {"d1": 3, "k": 1}, "finite"),
    ],
)
def test_a_null_of_nothing_is_refused(values, settings_, message):
    with pytest.raises(SubspaceError, match=message):
        rotation_null(values, **settings_)


# -- theorems


# 10 users, d1=20, d2=5, k=3, as in the synthetic experiments: 3 (20 + 50), 10*3*25, 10*100
def test_counts_and_proposition_1_by_hand():
    assert parameter_count(3, 20, 5, 10) == 210
    assert parameter_count(3, 20, 5, 10, kind="lora") == 750
    assert parameter_count(3, 20, 5, 10, kind="full") == 1000
    assert log_bracketing(3, 20, 5, 10, 200) == pytest.approx(210 * math.log(2000 / 0.05))
    assert log_bracketing(3, 20, 5, 10, 200, delta=0.5, kind="full") == pytest.approx(1000 * math.log(4000))


def test_theorems_by_hand():
    terms = {"log_bracketing": 8.0, "n_users": 4, "n_comparisons": 10, "nu": 2.0, "sigma_tail": 16.0}
    # 8/(4*10*2) = .1; sqrt(16/4)/2 = 1
    assert theorem_4_1(**terms) == pytest.approx(math.sqrt(1.1))
    assert theorem_4_1(**terms | {"sigma_tail": 0.0}) == pytest.approx(math.sqrt(0.1))
    # (3*5 + log(4/.1))/10
    own = (15 + math.log(40)) / 10
    more = {"k": 3, "d2": 5, "delta": 0.1}
    assert theorem_4_2(**terms, **more, b_i=0.25) == pytest.approx(math.sqrt(1.35 + own))
    assert corollary_4_1(**terms, **more) == pytest.approx(math.sqrt(1.1 + own))
    assert corollary_b_1(log_bracketing=math.log(4), n_users=4, n_comparisons=10, sigma_tail=16.0) == pytest.approx(
        math.sqrt(math.log(4) / 40 + 2)
    )
    # (B.1) with L1 = 2, c3 = 3: sqrt(3/8 (.2 + .1 + 1 + own))
    assert zeta(**terms, **more, errors=[0.7, 0.2], lipschitz=2.0, constant=3.0) == pytest.approx(
        math.sqrt(3 / 8 * (1.3 + own))
    )
    assert zeta(**terms, **more, errors=torch.tensor([0.2])) == pytest.approx(math.sqrt((1.3 + own) / 2))


def test_remark_3_by_hand():
    common = dict(k=3, d1=20, d2=5, n_users=10, epsilon=0.1, delta=0.5)
    log = math.log(20)
    assert samples_needed(**common) == pytest.approx(210 / (10 * 0.1) * log)
    assert samples_needed(**common, kind="full") == pytest.approx(100 / 0.1 * log)
    assert samples_needed(**common, kind="park") == pytest.approx((60 + 30) / (10 * 0.1) * log)


def test_the_theorems_have_the_slopes_they_state():
    def bound(**changes):
        values = {"n_users": 10, "n_comparisons": 100, "nu": 1.0, "log_bracketing": 50.0} | changes
        return theorem_4_1(**values)

    for name in ("n_comparisons", "n_users", "nu"):
        four_times = bound(**{name: 4 * {"n_comparisons": 100, "n_users": 10, "nu": 1.0}[name]})
        assert bound() / four_times == pytest.approx(2)
    # the bias term alone falls with the fourth root of N
    biased = [bound(log_bracketing=0.0, sigma_tail=3.0, n_users=n) for n in (1, 16)]
    assert biased[0] / biased[1] == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parameter_count(0, 2, 2, 2), "k=0"),
        (lambda: parameter_count(1, 2, 2, 2, kind="park"), "kind='park'"),
        (lambda: log_bracketing(1, 2, 2, 2, 0), "n_comparisons=0"),
        (lambda: log_bracketing(1, 2, 2, 2, 5, delta=1.0), "delta=1.0"),
        (lambda: theorem_4_1(log_bracketing=1.0, n_users=2, n_comparisons=5, nu=0.0), "nu=0.0"),
        (
            lambda: theorem_4_1(log_bracketing=1.0, n_users=2, n_comparisons=5, nu=1.0, sigma_tail=-1.0),
            "sigma_tail=-1.0",
        ),
        (lambda: theorem_4_1(log_bracketing=math.nan, n_users=2, n_comparisons=5, nu=1.0), "log_bracketing=nan"),
        (lambda: theorem_4_2(log_bracketing=1.0, n_users=2, n_comparisons=5, nu=1.0, k=1, d2=2, b_i=-0.1), "b_i=-0.1"),
        (
            lambda: zeta(log_bracketing=1.0, n_users=2, n_comparisons=5, nu=1.0, k=1, d2=2, lipschitz=0.0),
            "lipschitz=0.0",
        ),
        (lambda: corollary_b_1(log_bracketing=1.0, n_users=0, n_comparisons=5), "n_users=0"),
        (lambda: samples_needed(1, 2, 2, 2, epsilon=0.0), "epsilon=0.0"),
        (lambda: samples_needed(1, 2, 2, 2, epsilon=0.1, kind="lora"), "kind='lora'"),
    ],
)
def test_bounds_refuse_what_they_are_not_stated_for(call, message):
    with pytest.raises(SubspaceError, match=message):
        call()


# -- samples


def test_reward_differences_and_assumption_2():
    torch.testing.assert_close(
        reward_difference_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])),
        torch.tensor([2.5, 0.5], dtype=torch.float64),
    )
    assert uniform_concentration(torch.tensor([1.0, 3.0]), 4.0) == pytest.approx(0.5)
    # <Theta_1 - Theta_2, phi_0 - phi_1> with Gaussian features has variance 2 ||Theta_1 - Theta_2||²
    gap, features = normal(6), normal(40_000, 2, 6, seed=1)
    squares = ((features[:, 0] - features[:, 1]) @ gap).square()
    assert uniform_concentration(squares, 2 * float(gap.square().sum())) == pytest.approx(1, abs=0.03)
    for wrong in ((torch.tensor([]), 1.0), (torch.tensor([1.0]), 0.0), (torch.tensor([-1.0]), 1.0)):
        with pytest.raises(SubspaceError, match="squared gaps"):
            uniform_concentration(*wrong)
    with pytest.raises(SubspaceError, match="the same comparisons"):
        reward_difference_error(torch.zeros(3), torch.zeros(2))
    with pytest.raises(SubspaceError, match="NaN"):
        reward_difference_error(torch.tensor([math.nan]), torch.zeros(1))


def test_concentrability_by_hand():
    # two arms, both compared half the time: E[(g0 - g1)²] = 1/2 (g0 - g1)²; the target takes arm 0 always
    target, reference = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    truth, candidates = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    # g = (1, 0): above 1/2, below sqrt(1/2)
    found = concentrability(target, reference, truth=truth, candidates=candidates)
    assert found == pytest.approx(math.sqrt(1 / 2))
    # only candidates that say more than the truth: the maximum with 0
    assert concentrability(target, reference, truth=truth, candidates=candidates[2:]) == 0
    assert concentrability(target, reference, truth=truth, candidates=candidates[1:2]) == 0
    # of the linear class with one feature per arm the worst is the same g, up to its length
    assert concentrability(target, reference, features=torch.eye(2)) == pytest.approx(math.sqrt(1 / 2))


@settings(max_examples=30, deadline=None)
@given(arms=st.integers(2, 6), d=st.integers(1, 4), asymmetric=st.booleans(), seed=st.integers(0, 2**20))
def test_the_closed_form_is_the_supremum_over_linear_rewards(arms, d, asymmetric, seed):
    target, reference = normal(arms, seed=seed).softmax(0), normal(arms, seed=seed + 1).softmax(0)
    features = normal(arms, d, seed=seed + 2)
    pairs = normal(arms * arms, seed=seed + 3).softmax(0).reshape(arms, arms) if asymmetric else None
    d = min(d, arms - 1)
    features = features[:, :d]
    found = concentrability(target, reference, features=features, comparisons=pairs)
    truth = features @ normal(d, seed=seed + 4)
    candidates = truth - (features @ normal(d, 300, seed=seed + 5)).mT
    searched = concentrability(target, reference, truth=truth, candidates=candidates, comparisons=pairs)
    assert searched <= found * (1 + 1e-9)
    # the best one, from the eigenproblem's own solution, is reached
    weights = torch.outer(reference, reference) if pairs is None else pairs
    moments = sum(
        weights[a, b] * torch.outer(features[a] - features[b], features[a] - features[b])
        for a in range(arms)
        for b in range(arms)
    )
    best = torch.linalg.solve(moments, features.mT @ (target - reference))
    reached = concentrability(
        target, reference, truth=truth, candidates=(truth - features @ best)[None], comparisons=pairs
    )
    assert reached == pytest.approx(found, rel=1e-5)


def test_what_no_comparison_sees_has_no_finite_coefficient():
    target, reference = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
    features = torch.eye(3)
    assert concentrability(target, reference, features=features) == math.inf
    truth = torch.zeros(3)
    assert concentrability(target, reference, truth=truth, candidates=torch.tensor([[0.0, 0, -1]])) == math.inf
    # a reward that is constant over the arms differs in nothing
    assert concentrability(target, reference, truth=truth, candidates=torch.full((1, 3), 7.0)) == 0
    # the unseen arm looks like a seen one
    assert math.isfinite(concentrability(target, reference, features=features[[0, 1, 1]]))
    rarer = [
        concentrability(target, torch.tensor([0.5 - rare / 2, 0.5 - rare / 2, rare]), features=features)
        for rare in (0.3, 0.03, 0.003)
    ]
    assert rarer[0] < rarer[1] < rarer[2]
    assert rarer[2] / rarer[1] == pytest.approx(math.sqrt(10), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.tensor([0.5, 0.6])}, "target of shape"),
        ({"reference": torch.tensor([1.5, -0.5])}, "reference of shape"),
        ({"comparisons": torch.eye(2)}, "comparisons of shape"),
        ({"features": None}, "one of the two"),
        ({"candidates": torch.zeros(1, 2), "truth": torch.zeros(2)}, "one of the two"),
        ({"features": torch.eye(3)}, "2 arms"),
        ({"features": None, "candidates": torch.zeros(1, 3), "truth": torch.zeros(2)}, "2 arms"),
    ],
)
def test_concentrability_refuses_what_is_no_finite_problem(changes, message):
    values = {"target": torch.tensor([1.0, 0.0]), "reference": torch.tensor([0.5, 0.5]), "features": torch.eye(2)}
    values |= changes
    with pytest.raises(SubspaceError, match=message):
        concentrability(**values)
