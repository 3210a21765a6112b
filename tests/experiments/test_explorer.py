import base64
import json
import math
import shutil
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import visualize
from experiments.explorer import pack_mixing
from experiments.mixing import Mixing, layer_name, record_mixing
from experiments.trained import load_run, read_options
from neighbors import find_neighbors
from tests.helpers.tiny_runs import write_run

VIT = {"resize": 8, "patch_size": 2, "num_layers": 2, "num_heads": 2, "d_model": 8, "d_mlp": 8, "K": 4, "kernel_size": 3}
IMAGES = {"channels": [4, 6], "K": 4, "shuffle_pattern": "NA", "num_heads": 2}
RUNS = {
    "convnn": VIT | {"layer": "ConvNNAttention"},
    "joined": VIT | {"layer": "ConvNNAttention", "similarity_type": "Loc_Col", "magnitude_type": "euclidean"},
    "warm": VIT | {"layer": "ConvNNAttention", "score_temperature": 0.5},
    "scores": VIT | {"layer": "ConvNNAttention", "softmax_topk_val": False},
    "kvt": VIT | {"layer": "KvtAttention"},
    "attention": VIT | {"layer": "Attention", "num_local_layers": 1},
    "branches": VIT | {"layer": "BranchAttention"},
    "near": VIT | {"layer": "NeighborhoodAttention", "pool": "mean"},
    "vig": VIT | {"layer": "ViG", "dilation": 2},
    "mean": VIT | {"layer": "ViG", "graph_aggregation": "mean"},
    "axes": VIT | {"layer": "GreedyViG"},
    "regions": VIT | {"layer": "BlockTopK", "top_regions": 2},
    "conv": VIT | {"layer": "Conv1dAttention"},
    "images": IMAGES | {"layer": "Conv2d/ConvNN", "padding": 1},
    "projected": IMAGES | {"layer": "ConvNN_Attn", "shuffle_pattern": "BA"},
    "dense": IMAGES | {"layer": "Attention", "shuffle_pattern": "BA"},
    "graph": IMAGES | {"layer": "ViG", "graph_aggregation": "edge"},
    "conv2d": IMAGES | {"layer": "Conv2d"},
    "larger": IMAGES | {"layer": "ConvNN", "resize": 12},
}


def unpack_mixing(layer: dict) -> tuple[np.ndarray, np.ndarray]:
    """Decode a layer as the page does: index (B, H, N, K), the number of keys where absent, and weights."""
    index = values_of(layer["index"], "u1" if layer["bytes"] == 1 else "<u2")
    parts = values_of(layer["weights"], "u1").astype(float)
    parts = (parts - layer["zero"]) / (255 - layer["zero"])
    return index.reshape(layer["shape"]).astype(int), (layer["scale"] * parts * np.abs(parts)).reshape(layer["shape"])


def read_page(text: str) -> dict:
    """The data of a page."""
    return json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])


def values_of(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders that hold what these commands read of a run: options, and weights of an untrained model."""
    root = tmp_path_factory.mktemp("runs")
    for name, values in RUNS.items():
        write_run(root / name, values)
    return root


def page_of(runs, *names, images=3):
    line = ["explore", *(str(runs / name) for name in names), "--images", str(images)]
    args = visualize.make_parser().parse_args(line)
    return visualize.DRAW["explore"](args)


def outputs_of_projections(model, images):
    """Outputs and inputs of the `qkv` of each layer: q, k and v are thirds of an output."""
    found = []
    for name, module in model.named_modules():
        if name.endswith("qkv"):
            module.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    model(images)
    return found


def heads_of(part, heads):
    return part.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("name", ["convnn", "kvt", "projected"])
def test_the_page_holds_the_neighbors_that_find_neighbors_finds(runs, name):
    """Between the q and k of the model, and the softmax of their scores as weights, to the half of a step of a byte."""
    page = read_page(page_of(runs, name))
    config = read_options(runs / name).model
    metric = "matmul" if name == "kvt" else config.neighbors.metric
    model, images, labels, names = load_run(runs / name, 3, None)[3:]
    heads = 1 if name == "projected" else 2
    (run,) = page["runs"]
    assert [image["label"] for image in page["images"]] == [names[label] for label in labels]
    assert run["predictions"] == [names[number] for number in model(images).argmax(dim=1)]
    projections = outputs_of_projections(model, images)
    assert len(run["layers"]) == len(projections) == 2
    for layer, qkv in zip(run["layers"], projections, strict=True):
        query, key, _ = (heads_of(part, heads).flatten(0, 1) for part in qkv.chunk(3, dim=2))
        index, weights = unpack_mixing(layer)
        expected = find_neighbors(query, key, 4, metric)
        assert index.tolist() == expected.unflatten(0, (3, heads)).tolist()
        if metric == "cosine":
            query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
        scores = (query @ key.mT).gather(2, expected) / (math.sqrt(query.shape[2]) if metric == "matmul" else 1)
        expected = scores.softmax(dim=-1).unflatten(0, (3, heads)).numpy()
        assert np.abs(np.sqrt(weights / layer["scale"]) - np.sqrt(expected / layer["scale"])).max() <= 0.5 / 255 + 1e-6
        assert layer["share"] is None and layer["is_share"]


def test_neighbors_of_features_in_a_ring_of_padding(runs):
    """ConvNN compares what it is given, the ring of zeros too; the token itself is first."""
    model, images, _, _ = load_run(runs / "images", 3, None)[3:]
    inputs = []
    for block in model.layers:
        block[0].second.register_forward_hook(lambda module, given, output: inputs.append(given[0].detach()))
    model(images)
    layers = read_page(page_of(runs, "images"))["runs"][0]["layers"]
    assert [layer["name"] for layer in layers] == ["layer 1 (second)", "layer 2 (second)"]
    for number, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
        keys = nn.functional.pad(x, (1, 1, 1, 1)).flatten(2).mT
        inner = torch.arange(100).view(10, 10)[1:-1, 1:-1].flatten()
        index, weights = unpack_mixing(layer)
        assert index[:, 0].tolist() == find_neighbors(keys[:, inner], keys, 4, "cosine", self_index=inner).tolist()
        assert layer["grid"] == [10, 10] and layer["padding"] == 1 and layer["class_tokens"] == 0
        norms = model.layers[number][0].second.conv.weight.detach().square().sum(dim=(0, 1)).sqrt()
        assert weights == pytest.approx(np.broadcast_to((norms / norms.sum()).numpy(), weights.shape), abs=0.005)


@pytest.mark.parametrize("name", ["convnn", "joined", "scores", "warm", "kvt", "attention", "branches", "near", "regions"])
def test_recorded_weights_are_the_largest_of_the_mixing_matrix(runs, name):
    model, images, _, _ = load_run(runs / name, 2, None)[3:]
    logits, found = record_mixing(model, images, 3)
    expected, matrices = model(images, output_attentions=True)
    torch.testing.assert_close(logits, expected)
    if name == "branches":
        assert [mixing.name for mixing in found] == [f"block {n} ({part})" for n in (1, 2) for part in ("first", "second")]
        share = model.blocks[0].mixer.widths[0] / 8
        whole = torch.zeros(2, 2, 17, 17).scatter(3, found[0].index, found[0].weights)
        rest = (matrices[0] - share * whole) / (1 - share)
        torch.testing.assert_close(rest.gather(3, found[1].index), found[1].weights)
        return
    assert [mixing.class_tokens for mixing in found] == {"attention": [0, 1], "near": [0, 0]}.get(name, [1, 1])
    for mixing, matrix in zip(found, matrices, strict=True):
        K = 3 if name in ("attention", "near", "regions") else 4
        assert mixing.index.shape == (*matrix.shape[:3], K) and mixing.num_keys == matrix.shape[-1]
        torch.testing.assert_close(matrix.gather(3, mixing.index), mixing.weights)
        others = matrix.scatter(3, mixing.index, 0)
        torch.testing.assert_close(mixing.share, 1 - others.sum(dim=3) / matrix.sum(dim=3))
        assert mixing.is_whole == (name not in ("attention", "near", "regions"))
        assert mixing.is_share == (name != "scores")
        if mixing.is_whole:
            assert not others.any()
        else:
            assert (mixing.weights.amin(dim=3) >= others.amax(dim=3)).all()


@pytest.mark.parametrize("name", ["vig", "mean", "axes", "graph"])
def test_neighbors_of_a_graph_are_those_it_takes_features_from(runs, name):
    """A maximum has no mixing matrix: the weight of a neighbor is the share of the features that are its own."""
    model, images, _, _ = load_run(runs / name, 2, None)[3:]
    taken = []
    for module in model.modules():
        if type(module).__name__ == "GraphAggregation" and name != "axes":
            module.register_forward_hook(lambda module, inputs, output: taken.append((module, *inputs)))
        if name == "axes" and type(module).__name__ == "AxialGraphMixer":
            find = module.near_candidates
            module.near_candidates = lambda x, layout, find=find: taken.append((None, x, find(x, layout))) or taken[-1][2]
    with torch.no_grad():
        _, found = record_mixing(model, images, 17)
    assert len(found) == 2
    taken = taken if name != "axes" else taken[::2]  # each is asked for by the layer, then by the record
    for mixing, (graph, x, index) in zip(found, taken, strict=True):
        assert mixing.index.shape[1] == 1 and mixing.is_share
        c = mixing.class_tokens
        assert c == (name != "graph")
        assert mixing.weights.sum(dim=3) == pytest.approx(mixing.share.numpy(), abs=1e-5)
        assert mixing.share[:, :, c:] == pytest.approx(torch.ones(mixing.share[:, :, c:].shape).numpy(), abs=1e-5)
        if name != "axes":
            assert torch.equal(mixing.index[:, 0, c:], index)
        if name == "mean":
            assert (mixing.weights[:, :, c:] == 0.25).all() and (mixing.weights[:, :, :c] == 1 / mixing.num_keys).all()
            continue
        values = graph.relative(x).detach() if name == "graph" else x
        for token in range(mixing.index.shape[2]):
            mine = index[1, token - c].tolist() if token >= c else list(range(mixing.num_keys))
            best = values[1, mine].argmax(dim=0)
            counts = {j: sum(mine[slot] == j for slot in best.tolist()) / len(best) for j in mine}
            shown = {
                j: w for j, w in zip(mixing.index[1, 0, token].tolist(), mixing.weights[1, 0, token].tolist(), strict=True) if w
            }
            assert shown == pytest.approx({j: counts[j] for j in (shown if token < c else counts) if counts[j]})
            if token < c and len(shown) < sum(map(bool, counts.values())):  # some are left out: the weakest
                assert max(counts[j] for j in counts if j not in shown) <= min(shown.values())


def test_what_a_layer_packs_is_what_a_page_reads():
    """Absent neighbors, more than 255 keys, and negative weights."""
    index = torch.tensor([[[[0, 299], [299, -1]]]])
    weights = torch.tensor([[[[0.5, -2.0], [0.001, 0.0]]]])
    mixing = Mixing("block 1", "", (15, 20), 0, 0, index, weights, torch.tensor([[[0.25, 1.0]]]), is_whole=False)
    layer = pack_mixing(mixing)
    read, values = unpack_mixing(layer)
    assert read.tolist() == [[[[0, 299], [299, 300]]]]  # 300 is no key
    steps = np.sign(values) * np.sqrt(np.abs(values) / 2)
    assert steps == pytest.approx((weights.sign() * (weights.abs() / 2).sqrt()).numpy(), abs=0.5 / 127 + 1e-9)
    assert values[0, 0, 0, 1] == -2 and layer["zero"] == 128 and layer["bytes"] == 2


def test_a_page_needs_nothing_else(runs):
    text = page_of(runs, "convnn", "attention")
    assert "://" not in text and "<link" not in text
    assert text.count("<script") == 2 and "{{" not in text.partition('id="data">')[0]
    assert "\n" not in text.partition('id="data">')[2].partition("</script>")[0]
    page = read_page(text)
    assert [run["name"] for run in page["runs"]] == ["convnn", "attention"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page["images"])


def test_the_page_goes_beside_the_runs(runs, capsys):
    for names, place in ((["convnn"], runs / "convnn"), (["convnn", "kvt"], runs)):
        assert visualize.main(["explore", *(str(runs / name) for name in names), "--images", "1"]) == 0
        assert capsys.readouterr().out.strip() == str(place / "explorer.html")
        assert len(read_page((place / "explorer.html").read_text(encoding="utf-8"))["images"]) == 1
    shutil.copytree(runs / "convnn", runs / "more" / "convnn")
    page = read_page(page_of(runs, "convnn", "more/convnn", images=1))
    assert [run["name"] for run in page["runs"]] == [str(runs / "convnn"), str(runs / "more" / "convnn")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("explore nowhere", "nowhere holds no run"),
        ("explore conv", "layer=Conv1dAttention has no neighbors"),
        ("explore convnn conv2d", "conv2d: layer=Conv2d has no neighbors"),
        ("explore images larger", "larger: its images are of digits at 12 x 12, the images of images of digits at 8 x 8"),
        ("explore convnn --output page.png", "--output page.png is not a .html file"),
        ("explore convnn --images 0", "'0' is not a whole number of at least 1"),
        ("explore convnn --pairs 0", "'0' is not a whole number of at least 1"),
        ("explore convnn --images 9999", "9999"),
    ],
)
def test_errors_are_one_line(line, says, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as end:
        visualize.main(line.split())
    text = capsys.readouterr().err
    assert end.value.code == 2 and says in text and text.count("\n") == 1


def test_layer_names():
    assert layer_name("blocks.2.mixer", "block") == "block 3"
    assert layer_name("layers.0.0.second", "layer") == "layer 1 (second)"
    assert layer_name("features.16", "layer") == "layer features.16"
    assert layer_name("layer2.0.conv1.layer", "layer") == "layer layer2.0.conv1"


def test_every_layer_of_a_host_has_a_name_of_its_own(tmp_path):
    values = {"resize": 32, "layer": "ConvNN", "K": 4, "sampling_type": "spatial", "num_samples": 2}
    run = write_run(tmp_path / "run", values | {"model": "resnet18"})
    model, images, _, _ = load_run(run, 1, None)[3:]
    _, found = record_mixing(model, images, 4)
    assert len({mixing.name for mixing in found}) == len(found) > 4


def test_a_mixer_of_the_users_own_is_shown_by_its_matrix(runs):
    class Mean(nn.Module):
        """Every token becomes the mean of all."""

        def forward(self, x, output_attentions=False):
            matrix = x.new_full((len(x), 1, x.shape[1], x.shape[1]), 1 / x.shape[1])
            out = matrix[:, 0] @ x
            return (out, matrix) if output_attentions else out

    model, images, _, _ = load_run(runs / "convnn", 2, None)[3:]
    model.blocks[1].mixer = Mean()
    _, found = record_mixing(model, images, 17)
    assert [mixing.name for mixing in found] == ["block 1", "block 2"]
    assert (
        found[1].weights == pytest.approx(1 / 17) and found[1].index.sort(dim=3).values.tolist() == [[[[*range(17)]] * 17]] * 2
    )


# ---------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no browser here (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


# Once what was asked for is drawn, of every run: tokens in its list, and tokens with their places on its picture.
SHOWN = """async () => {
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return [...document.querySelectorAll("[data-panel]")].map((panel) => [
    [...panel.querySelectorAll(".list tr[data-token]")].map((row) => Number(row.dataset.token)),
    [...panel.querySelectorAll(".stage .cells [data-token]")].map((cell) =>
      [Number(cell.dataset.token), Number(cell.getAttribute("y")), Number(cell.getAttribute("x"))]),
  ]);
}"""
MIDDLE = """([x, y]) => {
  const stage = document.querySelector(".stage");
  stage.scrollIntoView({ block: "center" });
  const point = new DOMPoint(x, y).matrixTransform(stage.getScreenCTM());
  return [point.x, point.y];
}"""


@pytest.mark.parametrize("width", [360, 1600])
def test_tokens_answer_in_a_browser(runs, browser, tmp_path, width):
    """Pointed at, tapped and moved to, a token shows the neighbors that are computed, in every head and run."""
    path = tmp_path / "explorer.html"
    path.write_text(page_of(runs, "convnn", "kvt"), encoding="utf-8")
    layers = [run["layers"] for run in read_page(path.read_text(encoding="utf-8"))["runs"]]
    computed = [[unpack_mixing(layer)[0] for layer in of_run] for of_run in layers]
    context = browser.new_context(viewport={"width": width, "height": 800}, has_touch=width < 1000, color_scheme="dark")
    context.set_default_timeout(300_000)  # a loaded machine may be slow
    page = context.new_page()
    troubles, asked = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(".stage")

    def check(image, layer, head, token):
        for (listed, drawn), of_run in zip(page.evaluate(SHOWN), computed, strict=True):
            expected = of_run[layer][image, head, token].tolist()
            assert listed == expected == [number for number, *_ in drawn]
            for number, row, column in drawn:
                assert (row, column) == divmod(number - 1, 4) if number else row < 0

    def middle_of(row, column):
        """On the screen, of a token of the first run's picture."""
        return page.evaluate(MIDDLE, [column + 0.5, row + 0.5])

    for row, column in ((0, 0), (2, 3), (3, 1)):
        act = page.touchscreen.tap if width < 1000 else page.mouse.move
        act(*middle_of(row, column))
        check(0, 0, 0, 1 + 4 * row + column)
    if width > 1000:  # beside the picture the token that was clicked stays
        page.mouse.click(*middle_of(1, 1))
        page.mouse.move(*middle_of(3, 3))
        check(0, 0, 0, 16)
        page.mouse.move(2, 2)
        check(0, 0, 0, 1 + 4 + 1)
    else:
        page.touchscreen.tap(*middle_of(1, 1))
    page.focus(".stage")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    check(0, 0, 0, 1 + 4 * 2 + 2)
    page.keyboard.press("b")
    check(0, 1, 0, 1 + 4 * 2 + 2)
    page.keyboard.press("h")
    check(0, 1, 1, 1 + 4 * 2 + 2)
    page.keyboard.press("Shift+I")
    check(2, 1, 1, 1 + 4 * 2 + 2)
    page.keyboard.press("c")
    check(2, 1, 1, 0)
    page.click('[data-image="1"]')
    page.click('[data-panel="1"] .minis [data-layer="0"][data-head="1"]')
    check(1, 0, 1, 0)

    page.click('[data-mode="pickers"]')  # the other way: who takes from the class token
    for (_, drawn), of_run in zip(page.evaluate(SHOWN), computed, strict=True):
        takers = (of_run[0][1, 1] == 0).any(axis=1).nonzero()[0].tolist()
        assert sorted(number for number, *_ in drawn) == takers

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != dark
    assert not troubles and asked == [path.as_uri()]
    context.close()


@pytest.mark.parametrize("names", [["attention", "images"], ["dense"], ["branches", "scores", "near", "axes", "vig"]])
def test_every_layer_draws_in_a_browser(runs, browser, tmp_path, names):
    """Dense layers, rings of padding, raw scores, blocks without the class token: every button, without an error."""
    path = tmp_path / "explorer.html"
    path.write_text(page_of(runs, *names, images=1), encoding="utf-8")
    page = browser.new_page(viewport={"width": 700, "height": 800})
    page.set_default_timeout(300_000)
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.add_init_script("window.requestAnimationFrame = (draw) => draw()")  # at once, one drawing per button
    page.goto(path.as_uri())
    page.wait_for_selector(".stage")
    page.evaluate("for (const button of document.querySelectorAll('main button:not([hidden])')) button.click()")
    assert not troubles
    text = page.inner_text("main")
    assert "NaN" not in text and "undefined" not in text
    page.close()
