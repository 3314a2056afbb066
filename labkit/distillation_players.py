"""What the chapter on distillation steps through. Every number comes from a real run of the function it shows."""

import torch
import torch.nn.functional as F

from labkit import corpus, player
from labkit.check import compare
from labkit.distillation import kd_loss, kd_loss_and_grad

# ---- dark knowledge

CONTEXTS = ("import os\nimport ", "    def __init__(self, ", "        raise ValueError(", "for i in ran")
TEMPERATURES = (0.5, 1, 2, 4, 8)
SHOWN = 8


@torch.no_grad()
def next_logits(model, text):
    """The logits [V] of the byte after text."""
    return model(torch.tensor([[corpus.BOS, *corpus.encode(text)]]))[0, -1]


def byte_name(i):
    return {corpus.BOS: "BOS", corpus.EOS: "EOS"}.get(i) or repr(chr(i))


def softened(logits, temperature):
    """(probabilities [V], their entropy in bits) at a temperature."""
    p = (logits / temperature).softmax(-1)
    return p, -(p * p.clamp(min=1e-30).log2()).sum().item()


def temperature_player(model):
    """What the teacher says of the next byte, at several temperatures."""
    found = {text.replace("\n", "⏎"): next_logits(model, text) for text in CONTEXTS}

    def frame(name, temperature):
        logits = found[name]
        p, entropy = softened(logits, temperature)
        top = logits.topk(SHOWN).indices.tolist()
        longest = softened(logits, TEMPERATURES[0])[0].max()
        bars = []
        for i, t in enumerate(top):
            end, label = 100 * (p[t] / longest).item(), f"{byte_name(t)}  {p[t]:.3f}"
            inside = end > 60  # else the label stands behind the bar
            bars.append((i, 0.0, end, "sky" if i else "blue", label if inside else ""))
            bars.append((i, end, end, "", "" if inside else label))
        rest = 1 - p[top[0]].item()
        numbers = {"entropy, bits": f"{entropy:.2f}", "not on the likeliest": f"{rest:.1%}"}
        text = f"At T = {temperature}, {byte_name(top[0])} has {p[top[0]]:.1%}; the other 257 share {rest:.1%}."
        return {"text": text, "p": bars, "numbers": numbers}

    ranks = [f"{i + 1}." for i in range(SHOWN)]
    panels = {
        "p": player.Bars(ranks, span=100, long_labels=True, name="% of the largest p after this text"),
        "numbers": player.Values(["entropy, bits", "not on the likeliest"]),
    }
    start = (list(found)[2], 2)
    return player.Explorer(
        "Dark knowledge", {"after": list(found), "temperature": list(TEMPERATURES)}, panels, frame,
        legend={"blue": "the likeliest byte", "sky": "the next seven"}, start=start,
        caption="The lab's model on the byte after a text. A hard label is one byte; the teacher ranks them all.",
    )  # fmt: skip


# ---- one mode or both

X = torch.linspace(-6, 6, 121, dtype=torch.float64)
DIVERGENCES = {
    "forward KL": dict(kind="forward_kl"),
    "JSD, beta 0.1": dict(kind="jsd", beta=0.1),
    "JSD, beta 0.5": dict(kind="jsd", beta=0.5),
    "JSD, beta 0.9": dict(kind="jsd", beta=0.9),
    "reverse KL": dict(kind="reverse_kl"),
}
STEPS = (0, 5, 15, 50, 200)


def bell(mu, sigma):
    """The logits of a bell curve on X: a student with two parameters."""
    return -0.5 * ((X - mu) / sigma) ** 2


def two_modes():
    """The logits of the teacher on X: 60 % around -2, 40 % around 2."""
    modes = [bell(mu, 0.6).log_softmax(-1) + torch.tensor(share).log() for mu, share in ((-2.0, 0.6), (2.0, 0.4))]
    return torch.logaddexp(*modes)


def descend(options, starts, steps=STEPS[-1], lr=0.1):
    """{start: [(mean, width, loss)]} of a bell that learns from the two modes, by Adam on `kd_loss`: at first and after
    each step. All starts at once; Adam keeps them apart."""
    mu = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.zeros_like(mu, requires_grad=True)
    teacher, path = two_modes().expand(len(starts), -1), []
    optimizer = torch.optim.Adam([mu, log_sigma], lr=lr)
    for _ in range(steps + 1):
        loss = kd_loss(bell(mu[:, None], log_sigma.exp()[:, None]), teacher, reduction="none", **options)
        path.append(torch.stack((mu, log_sigma.exp(), loss), 1).tolist())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return {start: [tuple(point[i]) for point in path] for i, start in enumerate(starts)}


def between(logits):
    """The share of a distribution on X that lies between the modes, where the teacher has little."""
    return logits.softmax(-1)[X.abs() < 1].sum().item()


def lanes_of(logits):
    """The probability within 0.25 of every multiple of 0.5, from -6 to 6: 25 numbers."""
    return F.pad(logits.softmax(-1), (2, 2)).view(-1, 5).sum(-1).tolist()


def landscape_player(starts=(-3.0, 0.5, 3.0)):
    """A bell that imitates two modes, on its way down from several starts, beside the teacher."""
    teacher, paths = lanes_of(two_modes()), {name: descend(o, starts) for name, o in DIVERGENCES.items()}

    def frame(name, start, step):
        m, s, value = paths[name][start][step]
        bars, share = [], between(bell(m, s))
        for lane, (t, p) in enumerate(zip(teacher, lanes_of(bell(m, s)))):
            pair = [(lane, 0, round(t, 3), "muted", ""), (lane, 0, round(p, 3), "orange", "")]  # few states: small
            bars += sorted(pair, key=lambda bar: -bar[2])  # the shorter one in front
        where = f"mean {m:.2f}, width {s:.2f}; {share:.0%} of it between the modes"
        text = f"{name} from {start}, after {step} steps: {where}."
        numbers = {"loss": f"{value:.3f}", "between the modes": f"{share:.1%} (teacher: {between(two_modes()):.1%})"}
        return {"text": text, "p": bars, "student": numbers}

    names = [i // 2 if i % 2 == 0 else "" for i in range(-12, 13)]
    panels = {
        "p": player.Bars(names, unit="probability", lane_height=0.8, name="x, in steps of 0.5"),
        "student": player.Values(["loss", "between the modes"]),
    }
    controls = {"divergence": list(DIVERGENCES), "start at": list(starts), "step": list(STEPS)}
    legend = {"muted": "teacher", "orange": "student"}
    caption = "A bell with two parameters learns from two modes, 60 % at -2 and 40 % at 2, by Adam on the lab's loss."
    start = ("forward KL", starts[-1], STEPS[-1])
    return player.Explorer("One mode or both?", controls, panels, frame, legend=legend, caption=caption, start=start)


# ---- the live cell


def try_loss(kernel, teacher, student, kind, temperature, beta=0.5, device="cpu"):
    """Loss and size of the gradient of the kernel on two models' logits, and whether they are right."""
    ids = torch.tensor([[corpus.BOS, *corpus.encode(CONTEXTS[-1])]])
    with torch.no_grad():
        z, t = (model(ids)[0] for model in (student, teacher))
    options = dict(kind=kind, temperature=float(temperature), beta=beta)
    inputs = z.to(device), t.to(device)
    loss, grad = kernel(*inputs, **options)
    right = all(verdict.ok for verdict in compare((loss, grad), kd_loss_and_grad, *inputs, **options))
    return f"{kind} at T = {temperature}: loss {loss:.4f}, gradient {grad.norm():.5f}; {'right' if right else 'WRONG'}"
