"""Linear Recurrent Unit: attention replaced by a linear recurrence with diagonal complex transition.

    lambda = exp(-exp(nu_log) + i exp(theta_log))
    x_t = lambda x_{t-1} + exp(gamma_log) B u_t                                                     (1)
    y_t = Re(C x_t) + D u_t                                                                         (2)
    o_t = W_1 g_t * sigmoid(W_2 g_t),    g_t = GELU(y_t)

The bidirectional form runs (1) over the reversed sequence too and reads both states by a C twice as wide. Letters:
N complex states. Cost O(n N d) FLOPs; state: N complex numbers.

Source: 2303.06349, section 3 and appendix A.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.masks import blank, check_mask, refuse_context
from tevo.functional.scan import scan

CARD = Card(
    id="lru",
    role="mixer",
    summary="Attention replaced by a linear recurrence with a diagonal complex transition, initialised on a ring.",
    equations=(
        r"\lambda = \exp(-\exp(\nu^{\log}) + i \exp(\theta^{\log}))",
        r"x_t = \lambda \odot x_{t-1} + \exp(\gamma^{\log}) \odot (B u_t)",
        r"y_t = \mathrm{Re}(C x_t) + D \odot u_t",
        r"o_t = W_1 g_t \odot \sigma(W_2 g_t),\quad g_t = \mathrm{GELU}(y_t)",
    ),
    exports={"lru": "LRU"},
    cost="n",
    flops="n * (state_dim or d) * (8 * d + 8 if causal else 12 * d + 16) + 4 * n * d * d",
    state="2 * (state_dim or d)",
    parameters="(state_dim or d) * (3 + (4 if causal else 6) * d) + 2 * d * d + 3 * d",
    memory="n",
    claims=("bidirectional", "causal", "padding", "exact_state", "nan_contained"),
    examples=(
        {"dim": 12, "state_dim": 7},
        {"dim": 5},
        {"dim": 3, "state_dim": 11, "r_min": 0.9, "r_max": 0.999, "max_phase": 0.314, "causal": False},
    ),
    equals=("NicolasZucchet/minimal-LRU at bbd71b1, LRU and SequenceLayer (post-norm)",),
    departures=(
        "The GELU and gated linear unit of the paper's layer belong to the mixer, so that it drops into a block with its "
        "own norm, residual connection and feed-forward; the paper's model has no feed-forward besides.",
        "The paper trains lambda, gamma and B with a quarter of the learning rate; here every parameter has the recipe's. "
        "None of the three is decayed, as in the paper.",
    ),
)


def eigenvalues(nu_log: Tensor, theta_log: Tensor) -> Tensor:
    """Lambda (N,) complex, inside the unit circle whatever the parameters."""
    return torch.polar((-nu_log.exp()).exp(), theta_log.exp())


def lru_inputs(u: Tensor, gamma_log: Tensor, B_re: Tensor, B_im: Tensor) -> Tensor:
    """What equation (1) adds to the state: u (b, n, d), B (N, d) give (b, n, N) complex."""
    gamma = gamma_log.exp()[:, None]
    B = torch.stack([gamma * B_re, gamma * B_im], 1).flatten(0, 1)  # 2N d
    Bu = F.linear(u, B).unflatten(-1, (-1, 2))  # b n N 2
    return torch.view_as_complex(Bu.to(torch.promote_types(u.dtype, torch.float32)))


def lru_outputs(x: Tensor, u: Tensor, C_re: Tensor, C_im: Tensor, D: Tensor) -> Tensor:
    """Equation (2): x (b, n, M) complex, u (b, n, d), C (d, M) give y (b, n, d)."""
    C = torch.stack([C_re, -C_im], -1).flatten(-2)  # d 2M
    return F.linear(torch.view_as_real(x).flatten(-2).to(u.dtype), C) + D * u


class LRU(TokenMixer):
    """Linear Recurrent Unit with the paper's GELU and gated linear unit behind it.

    Args:
        dim: width d.
        state_dim: number N of complex states; by default dim.
        causal: False adds a recurrence from the end and doubles C.
        r_min: smallest |lambda| at the start, >= 0.
        r_max: largest |lambda| at the start, <= 1; long tasks of the paper use r_min=0.9, r_max=0.999.
        max_phase: largest phase of lambda at the start, in radians; pi / 10 for the paper's longest task.
        dropout: probability with which a feature is dropped behind the GELU in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        state_dim: int | None = None,
        causal: bool = True,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= r_min < r_max <= 1 or max_phase <= 0:
            raise ValueError(
                f"LRU got r_min={r_min}, r_max={r_max}, max_phase={max_phase}; expected 0 <= r_min < r_max <= 1 and a "
                "positive phase in radians"
            )
        N = dim if state_dim is None else state_dim
        self.causal = causal
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.dropout = dropout
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(N)) for _ in range(3))
        self.B_re, self.B_im = (nn.Parameter(torch.empty(N, dim)) for _ in range(2))
        self.C_re, self.C_im = (nn.Parameter(torch.empty(dim, N if causal else 2 * N)) for _ in range(2))
        self.D = nn.Parameter(torch.empty(dim))
        self.glu = nn.Linear(dim, 2 * dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Lambda uniform on the ring r_min <= |lambda| <= r_max with phases below max_phase (the paper's ring lemma).

        Gamma makes the state's variance that of white input; B, C, D are normal with variances 1/(2d), 1/N, 1; the
        gated unit has variance 1/d, as the official code.
        """
        N, d = self.B_re.shape
        # in float64, for 1 - |lambda|^2 of lambdas close to the circle
        area, angle = torch.rand(2, N, dtype=torch.float64, device=self.D.device)
        nu = -0.5 * (area * (self.r_max**2 - self.r_min**2) + self.r_min**2).log()
        self.nu_log.copy_(nu.log())
        self.theta_log.copy_((self.max_phase * angle).log())
        self.gamma_log.copy_(0.5 * (-torch.expm1(-2 * nu)).log())
        for weight, variance in ((self.B_re, 0.5 / d), (self.B_im, 0.5 / d), (self.C_re, 1 / N), (self.C_im, 1 / N)):
            nn.init.normal_(weight, std=variance**0.5)
        nn.init.normal_(self.D)
        nn.init.normal_(self.glu.weight, std=d**-0.5)
        nn.init.zeros_(self.glu.bias)

    def no_decay(self) -> set[str]:
        """B, beside the vectors."""
        return {"B_re", "B_im"}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); order is that of the tokens, not ``at``."""
        refuse_context("LRU", context)
        check_mask("LRU", mask, x.shape[0], x.shape[1])
        y, _ = self.unit(blank(x, mask), mask)
        return self._behind(y)

    def unit(self, u: Tensor, keep: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Equations (1) and (2): u (b, n, d), ``keep`` (b, n), ``state`` (b, N) give y (b, n, d) and x_n (b, N)."""
        wide = torch.promote_types(u.dtype, torch.float32)
        lam = eigenvalues(self.nu_log.to(wide), self.theta_log.to(wide))
        # where there is no token the state passes unchanged; u is zero there
        a = lam if keep is None else torch.where(keep[..., None], lam, 1.0)  # b n N
        Bu = lru_inputs(u, self.gamma_log, self.B_re, self.B_im)
        x, last = scan(a, Bu, state)  # (eq. 1)
        if not self.causal:
            back, _ = scan(a if keep is None else a.flip(1), Bu.flip(1))
            x = torch.cat([x, back.flip(1)], -1)
        return lru_outputs(x, u, self.C_re, self.C_im, self.D), last

    def _behind(self, y: Tensor) -> Tensor:
        g = F.dropout(F.gelu(y, approximate="tanh"), self.dropout, self.training)
        return F.glu(self.glu(g), -1)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Zeros (b, N, 2): real and imaginary parts."""
        refuse_context("LRU", context)
        if not self.causal:
            raise ValueError("LRU(causal=False) has no state to advance; build it with causal=True")
        wide = torch.promote_types(self.D.dtype, torch.float32)
        return (self.D.new_zeros(batch, len(self.nu_log), 2, dtype=wide),)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); padding leaves the state as it is."""
        assert isinstance(state, tuple) and isinstance(state[0], Tensor)
        check_mask("LRU", mask, x.shape[0], x.shape[1])
        y, last = self.unit(blank(x, mask), mask, torch.view_as_complex(state[0]))
        return self._behind(y), (torch.view_as_real(last),)
