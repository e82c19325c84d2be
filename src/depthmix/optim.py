"""Muon for the trunk's matrices and AdamW for everything else, in one optimiser step.

Muon (Jordan 2024; paper, Appendix B) replaces the averaged gradient ``G = U S V^T`` of a matrix by
its polar factor ``U V^T``: every direction is moved equally far. With momentum ``mu`` and rate ``lr``

    M <- mu M + (1 - mu) G
    W <- (1 - lr * decay) W - lr * sqrt(max(1, rows / cols)) * polar((1 - mu) G + mu M)

``polar`` is Polar Express (Amsel et al. 2025, Algorithm 1): five odd polynomials

    X <- a X + (b A + c A^2) X,    A = X X^T,    from X = G / (1.01 ||G||_F + 1e-7)

whose coefficients are the best possible for singular values in [1e-3, 1], step by step. A deep, thin
model has a hundred small matrices, so matrices of one shape are stacked and iterated as a batch.

Everything that is not a matrix of the trunk (embedding, norms, biases, gates, pooling vectors) is
AdamW's. Parameters in bf16 or fp16 are stepped through fp32 master weights kept in the optimiser's
state: a small rate times a small gradient would otherwise round away.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .config import OptimConfig
from .residuals import Residual, Site

if TYPE_CHECKING:
    from .parallel.shard import Layout

Coefficients = Sequence[tuple[float, float, float]]

# Coefficients (a, b, c) of each step. Dividing them by powers of 1.01 keeps a singular value that
# rounding has pushed above 1 from leaving the interval the next polynomial is made for; the last
# step has no next one.
_OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS: Coefficients = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _OPTIMAL[:-1]),
    _OPTIMAL[-1],
)

# A process takes matrices up to this many elements at once, so that the working memory of a large
# model's step stays a fraction of its weights.
BATCH_ELEMENTS = 1 << 26


@torch.no_grad()
def polar_express(
    matrices: Tensor,
    coefficients: Coefficients = POLAR_EXPRESS,
    *,
    margin: float = 1.01,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The polar factor ``U V^T`` of each matrix ``U S V^T``, approximately.

    ``matrices`` is ``[..., rows, cols]``; the result has its shape. The work is done in ``dtype``
    (None: that of ``matrices``), which is also the result's. The start is the matrix divided by
    ``margin`` times its Frobenius norm. A matrix of zeros stays zero.
    """
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"polar_express takes floating matrices [..., rows, cols], "
            f"got {matrices.dtype} {tuple(matrices.shape)}"
        )
    X = matrices.reshape(-1, *matrices.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    if tall:  # the smaller of the two Gram matrices
        X = X.mT
    # The norm is taken in fp32 at least: it scales everything that follows.
    norm_dtype = torch.promote_types(X.dtype, torch.float32)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=norm_dtype)
    X = (X / (margin * norm + 1e-7)).to(dtype or matrices.dtype)
    for a, b, c in coefficients:
        A = torch.bmm(X, X.mT)
        polynomial = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, polynomial, X, beta=a)
    if tall:
        X = X.mT
    return X.reshape(matrices.shape)


def parameter_groups(
    model: nn.Module, connection_apart: bool = False
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Names and parameters of ``model``, each in exactly one group.

    A residual connection's own parameters go where its sites say. Of the others, ``muon``: matrices
    ``[rows, cols]`` inside ``model.blocks``, the sublayers of :func:`depthmix.wrap` and the blocks of
    :func:`depthmix.adapt`; ``adamw``: all with two dimensions or more (the embedding), with
    weight decay; ``adamw_no_decay``: vectors and scalars. With ``connection_apart`` the connection's own parameters in
    either are in ``connection`` and ``connection_no_decay`` instead. A tied parameter appears once, under its first
    name. Raises ``ValueError`` for a parameter that fits no group, or two of them (tied between the trunk
    and something outside it).
    """
    trunk = tuple(
        f"{path}." for path, module in model.named_modules() if path and getattr(module, "in_trunk", False)
    )
    if isinstance(getattr(model, "blocks", None), nn.Module):
        trunk += ("blocks.",)
    if not trunk:
        raise ValueError(
            f"{type(model).__name__} has no module named 'blocks' and none of depthmix.wrap or depthmix.adapt, where "
            f"Muon's matrices are"
        )
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "adamw": [], "adamw_no_decay": []}
    connection = {
        f"{path}.{name}": module.optimizer_group(name, parameter)
        for path, module in model.named_modules()
        if isinstance(module, Site | Residual)
        for name, parameter in module.named_parameters()
    }
    if connection_apart:
        groups |= {"connection": [], "connection_no_decay": []}
        apart = {"adamw": "connection", "adamw_no_decay": "connection_no_decay"}
        connection = {name: apart.get(group, group) for name, group in connection.items()}
    placed: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name} is {parameter.dtype}: no optimiser group takes it")
        if name in connection:
            group = connection[name]
        elif parameter.ndim < 2:
            group = "adamw_no_decay"
        elif parameter.ndim == 2 and name.startswith(trunk):
            group = "muon"
        else:
            group = "adamw"
        if parameter not in placed:
            placed[parameter] = (name, group)
            groups[group].append((name, parameter))
        elif placed[parameter][1] != group:
            other, other_group = placed[parameter]
            raise ValueError(
                f"one parameter is both {other} (group {other_group}) and {name} (group {group}); "
                f"tie parameters within the trunk or outside it, not across"
            )
    return groups


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of :func:`parameter_groups` as any torch optimiser takes them, those with ``weight_decay`` first.

    Vectors, scalars and what a connection excludes have none. Frozen parameters are left out.
    """
    groups = parameter_groups(model)
    decayed = [p for _, p in groups["muon"] + groups["adamw"] if p.requires_grad]
    others = [p for _, p in groups["adamw_no_decay"] if p.requires_grad]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW over the groups of :func:`parameter_groups`, with one ``step()``.

    ``coefficients``, ``margin`` and ``dtype`` go to :func:`polar_express`; ``dtype`` None is bf16
    on a CUDA device and the weights' own dtype elsewhere. ``layout`` says how parameters are spread over processes
    (:class:`depthmix.parallel.shard.Layout`); norms are then those of the whole gradient, and Muon's updates those of
    whole matrices. All state is made at once, so a checkpoint
    of step 0 has the same tensors as any other.
    """

    def __init__(
        self,
        groups: dict[str, list[tuple[str, nn.Parameter]]],
        config: OptimConfig,
        *,
        coefficients: Coefficients = POLAR_EXPRESS,
        margin: float = 1.01,
        dtype: torch.dtype | None = None,
        layout: "Layout | None" = None,
    ):
        connection_lr = config.lr * config.connection_lr
        options = {
            "muon": {"peak_lr": config.muon_lr, "weight_decay": config.weight_decay},
            "adamw": {"peak_lr": config.lr, "weight_decay": config.weight_decay},
            "adamw_no_decay": {"peak_lr": config.lr, "weight_decay": 0.0},
            "connection": {"peak_lr": connection_lr, "weight_decay": config.weight_decay},
            "connection_no_decay": {"peak_lr": connection_lr, "weight_decay": 0.0},
        }
        super().__init__(
            [
                {"params": named, "kind": kind, "lr": options[kind]["peak_lr"], **options[kind]}
                for kind, named in groups.items()
                if named
            ],
            {},
        )
        self.config = config
        self.coefficients = coefficients
        self.margin = margin
        self.dtype = dtype
        self.layout = layout
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._fresh_state(parameter, group["kind"])

    @staticmethod
    def _fresh_state(parameter: nn.Parameter, kind: str) -> dict[str, Tensor]:
        state = {}
        weight = parameter.detach()
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight = state["master"] = weight.float()
        if kind == "muon":
            state["momentum"] = torch.zeros_like(weight)
        else:
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        return state

    def named_state(self) -> dict[str, Tensor]:
        """The live state tensors, named ``<parameter>:<kind of state>``, of the parameter's shape, ``step`` of ``[]``.

        Copy into them to restore.
        """
        return {
            f"{name}:{key}": tensor
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for key, tensor in self.state[parameter].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``, except that fp32 state of a bf16 parameter stays fp32."""
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the saved optimiser state has other parameter groups than this optimiser")
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for key, tensor in self.state[parameter].items():
                    tensor.copy_(state_dict["state"][index][key])

    def set_lr_fraction(self, fraction: float) -> None:
        """Set every group's learning rate to ``fraction`` of its peak."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * fraction

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        """What is stepped: the fp32 master of a low-precision parameter, else the parameter itself."""
        return self.state[parameter].get("master", parameter)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of low-precision parameters to those of their fp32 masters, and drop them.

        Called after each backward pass, it makes accumulation over micro-batches an fp32 sum.
        Without it, ``clip_grad_norm`` and ``step`` collect by themselves.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                master = self.state[parameter].get("master")
                if master is None or parameter.grad is None:
                    continue
                if master.grad is None:
                    master.grad = parameter.grad.float()
                else:
                    master.grad.add_(parameter.grad)
                parameter.grad = None

    def collected_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The gradients that a step of ``parameters``, each ``[...]``, would use, where they have any: live tensors."""
        gradients = [self._weight(p).grad for p in parameters]
        return [g for g in gradients if g is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of fp32 masters too."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            if "master" in state:
                state["master"].grad = None

    @torch.no_grad()
    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The joint 2-norm ``[]`` of the gradients collected for ``parameters``, as in :meth:`clip_grad_norm`."""
        self.collect_gradients()
        return self._norm(list(parameters))

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        gradients = [self._weight(p).grad for p in parameters]
        if self.layout is not None:
            return self.layout.norm(parameters, gradients)
        return nn.utils.get_total_norm([g for g in gradients if g is not None])

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint 2-norm is at most ``max_norm`` (0: leave them).

        Returns the norm before scaling, ``[]``, fp32 for low-precision parameters.
        """
        self.collect_gradients()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = self._norm(parameters)
        if max_norm:
            gradients = [self._weight(p).grad for p in parameters]
            share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([_local(g) for g in gradients if g is not None], share)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; what ``closure``, which is called first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.collect_gradients()
        for group in self.param_groups:
            stepped = [p for p in group["params"] if self._weight(p).grad is not None]
            if group["kind"] == "muon":
                most = BATCH_ELEMENTS if self.layout is None else self.layout.batch_elements(BATCH_ELEMENTS)
                keys = [(tuple(p.shape), str(getattr(p, "placements", ""))) for p in stepped]
                for batch in matrix_batches(keys, most):
                    self._step_muon([stepped[i] for i in batch], group)
            elif stepped:
                self._step_adamw(stepped, group)
            low_precision = [p for p in stepped if "master" in self.state[p]]
            if low_precision:
                torch._foreach_copy_(
                    [_local(p).detach() for p in low_precision],
                    [_local(self.state[p]["master"]) for p in low_precision],
                )
        return loss

    def _step_muon(self, batch: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights = [self._weight(p) for p in batch]
        gradients = [_local(w.grad) for w in weights]
        momenta = [_local(self.state[p]["momentum"]) for p in batch]
        weights = [_local(w).detach() for w in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - self.config.muon_momentum)
        nesterov = list(torch._foreach_lerp(gradients, momenta, self.config.muon_momentum))
        on_cuda = weights[0].device.type == "cuda"
        dtype = self.dtype or (torch.bfloat16 if on_cuda else weights[0].dtype)

        def polar(matrices: list[Tensor]) -> list[Tensor]:
            return self._polar(matrices, dtype)

        if self.layout is None:
            updates = polar(nesterov)
        else:
            updates = self.layout.whole_matrices(nesterov, batch, polar, dtype)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_scale: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, weight, update in zip(batch, weights, updates, strict=True):
            rows, cols = parameter.shape
            stepped, steps = by_scale.setdefault(max(1, rows / cols) ** 0.5, ([], []))
            stepped.append(weight)
            steps.append(update.to(weight.dtype))
        for scale, (stepped, steps) in by_scale.items():
            torch._foreach_add_(stepped, steps, alpha=-group["lr"] * scale)

    def _polar(self, matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Of each matrix; those of one shape in one go."""
        alike: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            alike.setdefault(matrix.shape, []).append(i)
        found = list(matrices)
        for places in alike.values():
            stacked = torch.stack([matrices[i] for i in places])
            factors = polar_express(stacked, self.coefficients, margin=self.margin, dtype=dtype)
            for i, factor in zip(places, factors, strict=True):
                found[i] = factor
        return found

    def _step_adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights = [self._weight(p) for p in parameters]
        adamw(
            [_local(w).detach() for w in weights],
            [_local(w.grad) for w in weights],
            [_local(self.state[p]["exp_avg"]) for p in parameters],
            [_local(self.state[p]["exp_avg_sq"]) for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            fused=True,  # one kernel for all tensors: most are vectors, where launching costs most
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def _local(x: Any) -> Tensor:
    """What this process holds of ``x``."""
    return x.to_local() if hasattr(x, "to_local") else x


def matrix_batches(keys: Sequence[tuple[tuple[int, ...], str]], most: int) -> list[list[int]]:
    """Which matrices Muon takes at once: places in ``keys``, at most ``most`` numbers together, or one matrix.

    ``keys``: ``(shape, whatever else must come together)`` of each; equal keys stay together as far as they can.
    """
    found: list[list[int]] = []
    size = most
    for i in sorted(range(len(keys)), key=lambda i: keys[i]):
        rows, cols = keys[i][0]
        size += rows * cols
        if size > most:
            found.append([])
            size = rows * cols
        found[-1].append(i)
    return found


def build_optimizer(
    parts: nn.Module | Sequence[nn.Module], config: OptimConfig, layout: "Layout | None" = None
) -> MuonAdamW:
    """The optimiser of a model's parameters, or of several stages', on the device and in the dtypes they have now.

    The connection's own parameters are groups apart where ``config.connection_lr`` is not 1.
    """
    parts = [parts] if isinstance(parts, nn.Module) else parts
    found = [parameter_groups(part, connection_apart=config.connection_lr != 1) for part in parts]
    groups = {kind: [named for groups in found for named in groups[kind]] for kind in found[0]}
    return MuonAdamW(groups, config, layout=layout)
