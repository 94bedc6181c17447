"""The training objective against the V3 paper's equations, written out here in float64 with plain
loops.

`Paper` reads the published tensors and the published config of a saved model and runs one document,
token by token (arXiv:2412.19437: MLA eqs. 1-11, DeepSeekMoE 12-16, balance loss 17-20, multi-token
prediction 21-25). It shares no code with the package. Two things are not in the equations and
follow the published weights and code: the order inside eh_proj (embedding first), and that an MTP
layer receives the hidden state after the final norm.

Indices as in the paper: t and i are positions, k is an MTP depth.
"""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from xushi.model import Batch, Deepseek, LossWeights, pretraining_loss, save_pretrained
from xushi.model.objective import sequence_balance_loss
from xushi.ops import RouterChoice

Document = tuple[list[int], list[bool]]  # T + 1 ids, and for each whether it is learned as a target


class Paper:
    """Losses of single documents, as sums and counts, in float64."""

    def __init__(self, directory) -> None:
        self.c = json.loads((directory / "config.json").read_text())
        self.w = {
            name: tensor.double().requires_grad_()
            for name, tensor in load_file(directory / "model.safetensors").items()
        }
        self.depth = self.c["num_hidden_layers"]
        self.embedding = self.w["model.embed_tokens.weight"]
        self.head = self.embedding if self.c["tie_word_embeddings"] else self.w["lm_head.weight"]
        self.routed: dict[
            int, list[tuple[Tensor, list[int]]]
        ] = {}  # layer: (scores, chosen) of each place

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        return (
            self.w[f"{name}.weight"]
            * x
            / torch.sqrt((x * x).mean() + (eps or self.c["rms_norm_eps"]))
        )

    def rotate(self, x: Tensor, t: int) -> Tensor:
        """Pairs (x0, x1), (x2, x3), ... turned by t * theta^(-2j / R)."""
        out = []
        for j in range(len(x) // 2):
            angle = t * self.c["rope_theta"] ** (-2 * j / len(x))
            a, b = x[2 * j], x[2 * j + 1]
            out += [
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            ]
        return torch.stack(out)

    def attention(self, name: str, xs: list[Tensor]) -> list[Tensor]:
        c = self.c
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        queries, keys, values = [], [], []
        for t, x in enumerate(xs):
            if c["q_lora_rank"] is None:
                q = self.w[f"{name}.q_proj.weight"] @ x
            else:
                latent = self.norm(
                    self.w[f"{name}.q_a_proj.weight"] @ x, f"{name}.q_a_layernorm", 1e-6
                )
                q = self.w[f"{name}.q_b_proj.weight"] @ latent
            down = self.w[f"{name}.kv_a_proj_with_mqa.weight"] @ x
            latent = self.norm(down[: c["kv_lora_rank"]], f"{name}.kv_a_layernorm", 1e-6)
            shared_key = self.rotate(down[c["kv_lora_rank"] :], t)
            up = (self.w[f"{name}.kv_b_proj.weight"] @ latent).view(heads, nope + c["v_head_dim"])
            q = q.view(heads, nope + rope)
            queries.append(
                [torch.cat((q[h, :nope], self.rotate(q[h, nope:], t))) for h in range(heads)]
            )
            keys.append([torch.cat((up[h, :nope], shared_key)) for h in range(heads)])
            values.append([up[h, nope:] for h in range(heads)])
        out = []
        for t in range(len(xs)):
            read = []
            for h in range(heads):
                scores = torch.stack(
                    [queries[t][h] @ keys[s][h] for s in range(t + 1)]
                ) / math.sqrt(nope + rope)
                p = scores.exp() / scores.exp().sum()
                read.append(sum(p[s] * values[s][h] for s in range(t + 1)))
            out.append(self.w[f"{name}.o_proj.weight"] @ torch.cat(read))
        return out

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.w[f"{name}.gate_proj.weight"] @ x, self.w[f"{name}.up_proj.weight"] @ x
        return self.w[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def experts(self, layer: int, x: Tensor) -> Tensor:
        c, name = self.c, f"model.layers.{layer}.mlp"
        scores = torch.sigmoid(self.w[f"{name}.gate.weight"] @ x)
        biased = (scores + self.w[f"{name}.gate.e_score_correction_bias"]).tolist()
        size = c["n_routed_experts"] // c["n_group"]
        groups = [range(g * size, (g + 1) * size) for g in range(c["n_group"])]
        groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        allowed = [e for group in groups[: c["topk_group"]] for e in group]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: c["num_experts_per_tok"]]
        self.routed.setdefault(layer, []).append((scores, chosen))
        total = sum(scores[e] for e in chosen) if c["norm_topk_prob"] else 1.0
        routed = sum(
            c["routed_scaling_factor"] * scores[e] / total * self.swiglu(f"{name}.experts.{e}", x)
            for e in chosen
        )
        return routed + self.swiglu(f"{name}.shared_experts", x)

    def block(self, layer: int, xs: list[Tensor]) -> list[Tensor]:
        name = f"model.layers.{layer}"
        mixed = self.attention(
            f"{name}.self_attn", [self.norm(x, f"{name}.input_layernorm") for x in xs]
        )
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        out = []
        for x in xs:
            u = self.norm(x, f"{name}.post_attention_layernorm")
            y = (
                self.experts(layer, u)
                if layer >= self.c["first_k_dense_replace"]
                else self.swiglu(f"{name}.mlp", u)
            )
            out.append(x + y)
        return out

    def log_p(self, hidden: Tensor, token: int) -> Tensor:
        logits = self.head @ hidden
        return logits[token] - logits.logsumexp(0)

    def document(self, ids: list[int], learned: list[bool]) -> list[tuple[Tensor, int]]:
        """(sum of -log P, how many) of the next token and then of each MTP depth; `routed` grows."""
        length = len(ids) - 1
        xs = [self.embedding[token] for token in ids[:length]]
        for layer in range(self.depth):
            xs = self.block(layer, xs)
        hidden = [self.norm(x, "model.norm") for x in xs]
        losses = [self._losses(hidden, ids, learned, 0, length)]
        for k in range(1, self.c["num_nextn_predict_layers"] + 1):
            name = f"model.layers.{self.depth + k - 1}"
            # Eq. 22 runs over T - k places. One more has its input, t_{T+1}, but nothing to
            # predict: nothing before it sees it, and its routing counts.
            inputs = [
                self.w[f"{name}.eh_proj.weight"]
                @ torch.cat(
                    (
                        self.norm(self.embedding[ids[i + k]], f"{name}.enorm"),
                        self.norm(hidden[i], f"{name}.hnorm"),
                    )
                )
                for i in range(max(length - k + 1, 0))
            ]
            hidden = [
                self.norm(x, f"{name}.shared_head.norm")
                for x in self.block(self.depth + k - 1, inputs)
            ]
            losses.append(self._losses(hidden, ids, learned, k, length))
        return losses

    def _losses(
        self, hidden: list[Tensor], ids: list[int], learned: list[bool], k: int, length: int
    ) -> tuple[Tensor, int]:
        places = [i for i in range(length - k) if learned[i + k + 1]]
        total = torch.zeros((), dtype=torch.float64)
        for i in places:
            total = total - self.log_p(hidden[i], ids[i + k + 1])
        return total, len(places)


def balance(routed: list[tuple[Tensor, list[int]]]) -> Tensor:
    """Eqs. 17-20 without alpha, over the positions of one document. Eq. 18 counts an expert if it
    is among the top K by s alone; here and in the package it counts if the router chose it, with
    bias and group limit.
    """
    experts, per_token, length = len(routed[0][0]), len(routed[0][1]), len(routed)
    total = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        f = experts / (per_token * length) * sum(e in chosen for _, chosen in routed)
        p = sum(scores[e] / sum(scores[j] for j in range(experts)) for scores, _ in routed) / length
        total = total + f * p
    return total


def paper_loss(
    paper: Paper, documents: list[Document], mtp_weight: float, balance_weight: float
) -> tuple[Tensor, dict[str, float], dict[str, list[int]]]:
    """The whole objective of several documents: (total, its parts, loads per layer).

    Each loss is a mean over its own targets. Eq. 24 divides by T where T - k targets are left, a
    factor of T / (T - k) per depth that the package does not have: it divides every loss by the
    number of its target tokens.
    """
    layers = paper.depth + paper.c["num_nextn_predict_layers"]
    sums = [
        [torch.zeros((), dtype=torch.float64), 0]
        for _ in range(1 + paper.c["num_nextn_predict_layers"])
    ]
    balances: dict[int, list[tuple[Tensor, int]]] = {}
    loads = {
        str(layer): [0] * paper.c["n_routed_experts"]
        for layer in range(layers)
        if layer >= paper.c["first_k_dense_replace"]
    }
    for ids, learned in documents:
        paper.routed = {}
        for whole, (total, count) in zip(sums, paper.document(ids, learned), strict=True):
            whole[0], whole[1] = whole[0] + total, whole[1] + count
        for layer, routed in paper.routed.items():
            balances.setdefault(layer, []).append((balance(routed), len(routed)))
            for _, chosen in routed:
                for e in chosen:
                    loads[str(layer)][e] += 1
    means = [total / max(count, 1) for total, count in sums]
    mtp = sum(means[1:]) / len(means[1:]) if means[1:] else torch.zeros((), dtype=torch.float64)
    balanced = sum(
        sum(value * n for value, n in each) / sum(n for _, n in each) for each in balances.values()
    )
    parts = {
        "next_token": float(means[0].detach()),
        "mtp": float(mtp.detach()),
        "balance": float(balanced.detach()),
    }
    return means[0] + mtp_weight * mtp + balance_weight * balanced, parts, loads


def pack(rows: list[list[Document]], length: int, pad: int = 0) -> Batch:
    """The design's batch: documents of a row one after another, what is left padded."""
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("tokens", "targets", "loss_mask", "positions", "segments")
    }
    for documents in rows:
        row: dict[str, list[int]] = {name: [] for name in columns}
        for segment, (ids, learned) in enumerate(documents):
            n = len(ids) - 1
            for name, values in (
                ("tokens", ids[:-1]),
                ("targets", ids[1:]),
                ("loss_mask", learned[1:]),
                ("positions", range(n)),
                ("segments", [segment] * n),
            ):
                row[name] += values
        left = length - len(row["tokens"])
        assert left >= 0
        for name, filler in (
            ("tokens", pad),
            ("targets", pad),
            ("loss_mask", False),
            ("positions", 0),
            ("segments", -1),
        ):
            columns[name].append(row[name] + [filler] * left)
    return Batch(**{name: torch.tensor(values) for name, values in columns.items()})


def random_documents(
    seed: int, lengths: list[int], vocabulary: int, masked: bool = False
) -> list[Document]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, vocabulary, (n + 1,), generator=g).tolist(),
            (torch.rand(n + 1, generator=g) < 0.6).tolist() if masked else [True] * (n + 1),
        )
        for n in lengths
    ]


def gradients(model: Deepseek) -> dict[str, Tensor]:
    """The gradients by parameter name; zero for a parameter without one."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_gradients_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The design's bound for float32: |d| <= 1e-5 (|g| + 1e-3 |g of the whole model|)."""
    assert set(got) == set(want)
    whole = torch.stack([g.double().norm() for g in want.values()]).norm()
    for name, gradient in got.items():
        assert (gradient.double() - want[name]).norm() <= 1e-5 * (
            want[name].double().norm() + 1e-3 * whole
        ), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 1},
        {"num_nextn_predict_layers": 2, "q_lora_rank": 6, "norm_topk_prob": False},
        {
            "num_nextn_predict_layers": 2,
            "n_group": 1,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
        },
    ],
)
def test_the_whole_objective_is_the_papers(
    changes: dict, masked: bool, random_model, tiny, tmp_path
) -> None:
    model = random_model(tiny(**changes), 31)
    documents = random_documents(31, [7, 2, 4, 1, 6, 3], 50, masked)
    batch = pack([documents[:3], documents[3:]], 14)
    save_pretrained(model, tmp_path / "weights")
    paper = Paper(tmp_path / "weights")
    # The balance loss gets a weight at which its gradient is not lost beside the others'.
    total, parts, loads = paper_loss(paper, documents, 0.7, 0.5)
    got = pretraining_loss(model, batch, LossWeights(0.7, 0.5))
    assert {name: load.tolist() for name, load in got.loads.items()} == loads
    for name, value in parts.items():
        assert float(getattr(got, name)) == pytest.approx(value, rel=1e-5), name
    assert float(got.total.detach()) == pytest.approx(float(total.detach()), rel=1e-5)

    total.backward()
    got.total.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    save_pretrained(model, tmp_path / "gradients")  # gradients in the published names
    written = load_file(tmp_path / "gradients" / "model.safetensors")
    copies = {
        name
        for name in written
        if name.startswith("model.layers.")
        and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
    }
    names = [
        name
        for name in written
        if name not in copies and not name.endswith("e_score_correction_bias")
    ]
    zero = {
        name: torch.zeros_like(paper.w[name]) if paper.w[name].grad is None else paper.w[name].grad
        for name in names
    }
    assert_gradients_close({name: written[name] for name in names}, zero)


def parts_and_gradients(
    model: Deepseek,
    batch: Batch,
    mtp_weight: float,
    balance_weight: float,
    indexer_weight: float = 0.0,
):
    model.zero_grad()
    parts = pretraining_loss(model, batch, LossWeights(mtp_weight, balance_weight, indexer_weight))
    parts.total.backward()
    return parts, gradients(model)


PARTS = {
    "next_token": ((0.0, 0.0), lambda n: n),
    "mtp": ((1.0, 0.0), lambda n: n - 1),
    "balance": ((0.0, 1.0), lambda n: n),
    "indexer": ((0.0, 0.0, 1.0), lambda n: n),
}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (kind, part)
        for kind in ("deepseek_v3", "deepseek_v32", "deepseek_v4")
        for part in PARTS
        if (kind, part) != ("deepseek_v3", "indexer")
    ],
)
def test_a_packed_batch_is_its_documents_weighted_by_their_tokens(
    kind, part, random_model, tiny_of
) -> None:
    """Value and gradient of each part, documents of unequal lengths."""
    weights, counted = PARTS[part]
    model = random_model(tiny_of(kind, num_nextn_predict_layers=1), 32)
    documents = random_documents(32, [9, 3, 12, 5, 1, 8], 50)
    _, without = parts_and_gradients(model, pack([documents[:3], documents[3:]], 26), 0.0, 0.0)

    def of(batch: Batch) -> tuple[float, dict[str, Tensor]]:
        parts, whole = parts_and_gradients(model, batch, *weights)
        _, base = parts_and_gradients(model, batch, 0.0, 0.0)
        return float(getattr(parts, part)), whole if part == "next_token" else {
            n: whole[n] - base[n] for n in whole
        }

    value, gradient = of(pack([documents[:3], documents[3:]], 26))
    alone = [of(pack([[document]], len(document[0]) - 1)) for document in documents]
    shares = [counted(len(ids) - 1) for ids, _ in documents]
    shares = [share / sum(shares) for share in shares]
    assert value == pytest.approx(
        sum(s * v for s, (v, _) in zip(shares, alone, strict=True)), rel=1e-5
    )
    want = {
        name: sum(s * g[name].double() for s, (_, g) in zip(shares, alone, strict=True))
        for name in gradient
    }
    # The part's gradient was had by subtraction, so its rounding is that of the whole.
    whole = torch.stack(
        [g.double().norm() for g in (without | {n + "'": g for n, g in want.items()}).values()]
    ).norm()
    for name, g in gradient.items():
        assert (g.double() - want[name]).norm() <= 1e-5 * (want[name].norm() + 0.1 * whole), name
    assert torch.stack([g.norm() for g in want.values()]).norm() > 1e-3 * whole


def test_two_depths_packed_and_alone(random_model, tiny) -> None:
    """Equal lengths, so that the documents weigh the same at both depths."""
    model = random_model(tiny(num_nextn_predict_layers=2), 33)
    documents = random_documents(33, [6, 6, 6, 6], 50)
    packed, gradient = parts_and_gradients(
        model, pack([documents[:2], documents[2:]], 15), 0.3, 0.01
    )
    alone = [parts_and_gradients(model, pack([[document]], 6), 0.3, 0.01) for document in documents]
    assert float(packed.mtp) == pytest.approx(
        sum(float(parts.mtp) for parts, _ in alone) / 4, rel=1e-5
    )
    assert_gradients_close(
        gradient, {name: sum(g[name].double() for _, g in alone) / 4 for name in gradient}
    )
    for name, load in packed.loads.items():
        assert torch.equal(load, sum(parts.loads[name] for parts, _ in alone))


def test_what_stands_in_the_padding_does_not_matter(random_model, tiny) -> None:
    model = random_model(tiny(num_nextn_predict_layers=2), 34)
    rows = [random_documents(34, [5, 4], 50), random_documents(35, [6], 50)]
    first, gradient = parts_and_gradients(model, pack(rows, 12, pad=0), 0.3, 0.01)
    second, again = parts_and_gradients(model, pack(rows, 12, pad=49), 0.3, 0.01)
    assert first.total == second.total
    assert all(torch.equal(gradient[name], again[name]) for name in gradient)


def test_documents_too_short_for_a_depth_give_zero(random_model, tiny) -> None:
    model = random_model(tiny(num_nextn_predict_layers=2), 36)
    parts, gradient = parts_and_gradients(
        model, pack([random_documents(36, [1, 1], 50)], 5), 0.3, 0.01
    )
    assert (
        parts.mtp == 0
        and parts.total.isfinite()
        and all(g.isfinite().all() for g in gradient.values())
    )


def test_parts_that_weigh_nothing_are_left_out(random_model, tiny) -> None:
    model = random_model(tiny(num_nextn_predict_layers=1), 37)
    batch = pack([random_documents(37, [9], 50)], 9)
    parts, gradient = parts_and_gradients(model, batch, 0.0, 0.0)
    assert parts.total == parts.next_token and parts.mtp == parts.balance == 0
    assert set(parts.loads) == {"1"}  # the MTP layer, "2", did not run
    assert not any(g.any() for name, g in gradient.items() if name.startswith("model.layers.2."))


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    length=st.integers(1, 12),
    experts=st.integers(2, 7),
    data=st.data(),
)
def test_balance_loss_is_equations_17_to_20(seed, rows, length, experts, data) -> None:
    """Documents of any lengths with padding between and after; value and gradient against loops."""
    per_token = data.draw(st.integers(1, experts))
    g = torch.Generator().manual_seed(seed)
    segments = (
        torch.randint(-1, 3, (rows, length), generator=g).sort(1, descending=bool(seed % 2)).values
    )
    scores = torch.rand(rows * length, experts, generator=g, dtype=torch.float64).requires_grad_()
    biased = data.draw(st.booleans())
    by = scores.detach() + torch.randn(experts, generator=g) * biased
    indices = by.topk(per_token, dim=-1).indices
    got = sequence_balance_loss(RouterChoice(scores, indices, scores.gather(1, indices)), segments)

    plain = scores.detach().clone().requires_grad_()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(rows):
        for document in range(3):
            places = [row * length + t for t in range(length) if segments[row, t] == document]
            if not places:
                continue
            if not biased:  # eq. 18 to the letter
                assert all(
                    set(indices[n].tolist()) == set(plain[n].topk(per_token).indices.tolist())
                    for n in places
                )
            total = total + len(places) * balance([(plain[n], indices[n].tolist()) for n in places])
            tokens += len(places)
    want = total / max(tokens, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if tokens:
        got.backward()
        want.backward()
        torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_even_routing_has_the_least_balance_loss() -> None:
    """With all experts equally chosen and equally scored the loss is 1; with one expert for all it
    is far more.
    """
    scores, even = torch.full((8, 4), 0.5), torch.tensor([[0, 1], [2, 3]] * 4)
    one = torch.full((8, 4), 0.1)
    one[:, :2] = 0.9
    segments = torch.zeros(1, 8, dtype=torch.int64)
    assert sequence_balance_loss(
        RouterChoice(scores, even, scores[:, :2]), segments
    ) == pytest.approx(1.0)
    uneven = sequence_balance_loss(
        RouterChoice(one, torch.tensor([[0, 1]] * 8), one[:, :2]), segments
    )
    assert uneven == pytest.approx(2 * 0.9)


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_activations_give_the_same_bits(kind, dtype, random_model, tiny_of) -> None:
    """Routing, indexers, streams and MTP layers with it."""
    results = []
    for recompute in (False, True):
        model = random_model(tiny_of(kind, num_nextn_predict_layers=int(kind == "deepseek_v3")), 5)
        model.compute_dtype, model.recompute = dtype, recompute
        tokens = torch.arange(40).remainder(model.config.vocab_size).view(2, 20)
        parts = pretraining_loss(
            model,
            Batch(
                tokens=tokens,
                targets=tokens.roll(-1, 1),
                positions=torch.arange(20).expand(2, 20),
                segments=torch.zeros_like(tokens),
                loss_mask=tokens >= 0,
            ),
            LossWeights(0.3, 0.1),
        )
        parts.total.backward()
        results.append(
            [parts.total.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    assert len(results[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
