"""The public clients of embedding servers on qemb-serve: docs/clients.md, and what it leaves out.

Every block of docs/clients.md runs against a server with the trained demo model. The vectors have
to be those of ./qemb for the same texts, to the bit: JSON has as many digits as a float32 needs.
The texts differ, so a shifted row or a missing prompt shows. Prometheus runs the queries of the
Grafana dashboard."""
# ruff: noqa: E402 - some packages read the environment when they are imported
import asyncio
import functools
import json
import os
import re
import subprocess
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request

# Nothing here may wait for a host outside: prices of models, usage statistics.
os.environ.update(
    ANONYMIZED_TELEMETRY="False",
    HAYSTACK_TELEMETRY_ENABLED="False",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
)

import haystack
import helpers
import litellm
import numpy as np
import ollama
import openai
import pytest
import tiktoken
from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as grafana
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from haystack_integrations.components.embedders.huggingface_api import HuggingFaceAPITextEmbedder
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from serve_client import GUARD, ROOT, TEXTS, server

DEMO = ROOT / "examples" / "demo.qemb"
DASHBOARD = ROOT / "packaging" / "grafana" / "qemb.json"
ADDRESS = "http://localhost:8080"  # of the page
PAGE = (ROOT / "docs" / "clients.md").read_text()
# LlamaIndex sends ten texts in a request, so these are several.
MORE = [f"the {n} planet of the sun" for n in ("first", "second", "third", "fourth")]
DOCUMENTS = TEXTS + MORE
QUESTION = "Which planet is red?"
pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own
LONG = "planet " * 3000  # the demo model takes 2,048 tokens


def blocks_of(page):
    """Returns {heading: code} of a page's blocks; "": the block before the first heading."""
    found, heading = {}, ""
    for m in re.finditer(r"^### ([^\n]+)$|^( *)```python\n(.*?)^ *```$", page, re.M | re.S):
        if m[1]:
            heading = m[1]
        else:
            assert heading not in found, f"{heading}: two blocks"
            found[heading] = textwrap.dedent(m[3])
    return found


def one_line(text):
    return text.replace("\n", " ")


# What a client does to a text before it sends it, as the page says.
CHANGED = {
    "llama-index-embeddings-openai-like": one_line,
    "llama-index-embeddings-text-embeddings-inference": str.strip,
    "llama-index-embeddings-ollama": str.strip,
    "ollama-haystack": one_line,
}
BLOCKS = blocks_of(PAGE)
PRELUDE = BLOCKS.pop("")


vectors_of = functools.partial(helpers.vectors_of, model=DEMO)


def same(got, want):
    """Asserts that got, vectors or one vector of a client, has the bits of want."""
    got = np.asarray(got, np.float64).astype(np.float32)
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.fixture(scope="module")
def s(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.qemb"
    file.symlink_to(DEMO)
    with server(model=str(file)) as running:
        yield running


@pytest.fixture(scope="module")
def url(s):
    return f"http://127.0.0.1:{s.port}"


@pytest.fixture(scope="module")
def want():
    """The vectors of the documents, and of the question as a query."""
    documents, query = vectors_of(DOCUMENTS), vectors_of([QUESTION], "--query")[0]
    assert len({row.tobytes() for row in documents}) == len(set(DOCUMENTS))
    assert query.tobytes() != vectors_of([QUESTION])[0].tobytes()
    return documents, query


# ---- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_the_page_gives_the_vectors_of_qemb(url, want, name):
    assert ADDRESS in BLOCKS[name]
    space = {"texts": list(DOCUMENTS), "question": QUESTION}
    exec(PRELUDE + BLOCKS[name].replace(ADDRESS, url), space)
    documents, query = want
    if name in CHANGED:
        documents = vectors_of([CHANGED[name](t) for t in DOCUMENTS])
    same(space["documents"], documents)
    same(space["query"], query)


def test_the_pages_prompt_is_the_models():
    space = {}
    exec(PRELUDE, space)
    info = subprocess.run([ROOT / "qemb", "info", "-m", DEMO], capture_output=True, check=True)
    assert f'"query": {json.dumps(space["prompt"])}' in info.stdout.decode()


def test_the_pages_curl(url):
    [command] = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
    done = subprocess.run(["bash", "-c", command.replace(ADDRESS, url)], capture_output=True)
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)["data"]
    same(answer["embedding"], vectors_of([QUESTION], "--query", "--dim", "8")[0])


def test_the_page_names_every_client():
    listed = (ROOT / "tests" / "world" / "clients.txt").read_text()
    names = set(re.findall(r"^([a-z_-]+)[>=]", listed, re.M))
    names -= {"llama-index-embeddings-openai", "grafana-foundation-sdk", "opentelemetry-sdk"}
    names -= {"numpy"}
    assert names <= set(BLOCKS)


# ---- other ways into the same clients ------------------------------------------------------------


async def asynchronous(url, texts):
    """Yields (name, vectors of the texts), each by an asynchronous client."""
    api = {"api_base": url + "/v1", "api_key": "none"}
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
    answer = await client.embeddings.create(model="model", input=texts)
    yield "openai", [e.embedding for e in answer.data]
    chain = OpenAIEmbeddings(
        model="model", base_url=url + "/v1", api_key="none", check_embedding_ctx_length=False
    )
    yield "langchain", await chain.aembed_documents(texts)
    for index in (
        OpenAILikeEmbedding(model_name="model", **api),
        TextEmbeddingsInference(model_name="model", base_url=url),
        OllamaEmbedding(model_name="model", base_url=url),
    ):
        yield type(index).__name__, await index.aget_text_embedding_batch(texts)
    for more in ({"model": "hosted_vllm/model", **api}, {"model": "ollama/model", "api_base": url}):
        answer = await litellm.aembedding(input=texts, **more)
        yield more["model"], [e["embedding"] for e in answer.data]
    yield "huggingface_hub", await AsyncInferenceClient(url).feature_extraction(texts)
    yield "ollama", (await ollama.AsyncClient(host=url).embed("model", texts)).embeddings
    embedder = OpenAIDocumentEmbedder(
        model="model", api_base_url=url + "/v1", api_key=Secret.from_token("none")
    )
    done = await embedder.run_async([haystack.Document(content=t) for t in texts])
    yield "haystack", [d.embedding for d in done["documents"]]


def test_asynchronous_clients(url):
    texts = [t for t in DOCUMENTS if t == one_line(t).strip()]  # as no client changes them
    documents = vectors_of(texts)

    async def check():
        n = 0
        async for name, got in asynchronous(url, texts):
            print(name)
            same(got, documents)
            n += 1
        return n

    assert asyncio.run(check()) == 10


def test_dimensions(url):
    api = {"api_base": url + "/v1", "api_key": "none"}
    v1 = {"model": "model", "api_key": "none", "base_url": url + "/v1"}
    chain = OpenAIEmbeddings(**v1, dimensions=8, check_embedding_ctx_length=False)
    stack = OpenAITextEmbedder(
        model="model", api_base_url=url + "/v1", api_key=Secret.from_token("none"), dimensions=8
    )
    answers = [
        openai.OpenAI(base_url=v1["base_url"], api_key="none")
        .embeddings.create(model="model", input=MORE[0], dimensions=8, encoding_format="float")
        .data[0].embedding,
        chain.embed_query(MORE[0]),
        OpenAIEmbedding(model_name="model", **api, dimensions=8).get_text_embedding(MORE[0]),
        litellm.embedding("hosted_vllm/model", [MORE[0]], dimensions=8, **api).data[0]["embedding"],
        litellm.embedding(
            "openai/model", [MORE[0]], dimensions=8, allowed_openai_params=["dimensions"], **api
        ).data[0]["embedding"],
        stack.run(MORE[0])["embedding"],
        InferenceClient(url).feature_extraction(MORE[0], dimensions=8)[0],
        ollama.Client(host=url).embed("model", MORE[0], dimensions=8).embeddings[0],
    ]
    for got in answers:
        same(got, vectors_of(MORE[:1], "--dim", "8")[0])


@pytest.mark.parametrize(
    "more",
    [
        {"model": "openai/model", "path": "/v1"},
        {"model": "openai_like/model", "path": "/v1"},
        {"model": "xinference/model", "path": "/v1"},
        {"model": "infinity/model", "path": ""},
        {"model": "jina_ai/model", "path": "/v1"},
        {"model": "voyage/model", "path": "/v1/embeddings"},
        {"model": "nvidia_nim/model", "path": "/v1", "input_type": "passage", "truncate": "END"},
        {"model": "ollama/model", "path": ""},
    ],
    ids=lambda more: more["model"],
)
def test_litellm_as_a_client_of_other_servers(url, want, more):
    more = dict(more)
    base = url + more.pop("path")
    answer = litellm.embedding(input=list(DOCUMENTS), api_base=base, api_key="none", **more)
    same([e["embedding"] for e in answer.data], want[0])


def test_what_ragflow_and_nims_clients_send(url):
    client = openai.OpenAI(base_url=url + "/v1/", api_key="none")
    for more in ({"drop_params": True}, {"input_type": "passage", "truncate": "END"}):
        answer = client.embeddings.create(
            model="model", input=MORE, encoding_format="float", extra_body=more
        )
        same([e.embedding for e in answer.data], vectors_of(MORE))
        assert answer.usage.total_tokens > len(MORE)


def test_haystacks_default_are_vectors_of_any_length(url):
    embedder = HuggingFaceAPITextEmbedder(
        api_type="text_embeddings_inference", api_params={"url": url}, token=None
    )
    assert not embedder.normalize
    got = np.asarray(embedder.run(MORE[0])["embedding"])
    length = np.linalg.norm(got)
    assert abs(length - 1) > 1e-3  # not scaled
    # qemb computes x / ||x|| in double and rounds it once to float32, by at most 2^-24 of a number.
    # The 260 roundings of double before that, here and there, are far below 2^-34.
    want = vectors_of(MORE[:1])[0].astype(np.float64)
    assert (np.abs(got / length - want) <= (2.0**-24 + 2.0**-34) * np.abs(want)).all()


def test_int8_and_binary_vectors(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")

    def ask(dtype, **more):
        answer = client.embeddings.create(
            model="model", input=MORE, extra_body={"embed_dtype": dtype}, **more
        )
        return np.array([e.embedding for e in answer.data])

    full = vectors_of(MORE)
    scaled = full.astype(np.float64) * 127 / np.abs(full).max(axis=1, keepdims=True)
    # Rounding in another precision may decide a tie otherwise: none is near.
    assert np.abs(scaled % 1 - 0.5).min() > 1e-5
    assert (ask("int8", encoding_format="float") == np.rint(scaled)).all()
    assert (ask("ubinary", encoding_format="float") == np.packbits(full > 0, axis=1)).all()
    # As the page says: 256 bytes, read as 64 floats.
    assert ask("int8").shape == (len(MORE), full.shape[1] / 4)


def test_a_trace_goes_into_the_log(s, url):
    with TracerProvider().get_tracer("test").start_as_current_span("embed") as span:
        carried = {}
        TraceContextTextMapPropagator().inject(carried)
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    client.embeddings.create(model="model", input=QUESTION, extra_headers=carried)
    context = span.get_span_context()
    want = (format_trace_id(context.trace_id), format_span_id(context.span_id))
    with s.changed:
        assert s.changed.wait_for(
            lambda: want in [(e.get("trace_id"), e.get("span_id")) for e in s.log], GUARD
        )


def test_models_are_listed(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    assert [m.id for m in client.models.list().data] == ["model"]
    assert client.models.retrieve("model").id == "model"
    with pytest.raises(openai.NotFoundError, match="Qwen/Qwen3-Embedding-0.6B"):
        client.models.retrieve("Qwen/Qwen3-Embedding-0.6B")
    client = ollama.Client(host=url)
    [listed] = client.list().models
    one = vectors_of(MORE[:1])
    for name in {listed.model, "model", "model:latest"}:
        same(client.embed(name, MORE[0]).embeddings, one)
        same(client.embeddings(name, MORE[0]).embedding, one[0])


def test_the_fingerprint_names_the_recipe(url):
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    seen = {}
    for name, more in (("document", {}), ("query", {"input_type": "query"})):
        raw = client.embeddings.with_raw_response.create(
            model="model", input=[QUESTION], extra_body=more
        )
        seen[name] = raw.headers["x-qemb-fingerprint"]
        assert re.fullmatch("[0-9a-f]{32}", seen[name])
        assert raw.parse().system_fingerprint == seen[name]
    assert seen["document"] != seen["query"]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def one_token_a_byte(monkeypatch):
    """OpenAI's tokenizer in small: tiktoken would download the real table."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str="(?s).", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: encoding)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def test_langchains_default_is_refused(url, one_token_a_byte):
    server = {"model": "model", "base_url": url + "/v1", "api_key": "none"}
    for embed in (
        lambda: OpenAIEmbeddings(**server).embed_documents(list(MORE)),
        lambda: OpenAIEmbeddings(**server).embed_query(QUESTION),
        lambda: asyncio.run(OpenAIEmbeddings(**server).aembed_documents(list(MORE))),
    ):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            embed()


def test_an_error_is_the_clients_exception_with_the_servers_words(s, url):
    def words(path, body, key="error"):
        answer = s.post(body, path)
        assert 400 <= answer.status < 500, answer.body
        e = answer.json[key]
        return e["message"] if isinstance(e, dict) else e

    said = words("/v1/embeddings", {"model": "model", "input": [LONG]})
    assert "2048" in said
    v1 = {"model": "model", "base_url": url + "/v1", "api_key": "none"}
    like = {"model_name": "model", "api_base": url + "/v1", "api_key": "none"}
    stack = {"model": "model", "api_base_url": url + "/v1", "api_key": Secret.from_token("none")}
    chain = OpenAIEmbeddings(**v1, check_embedding_ctx_length=False)
    client = openai.OpenAI(base_url=url + "/v1", api_key="none")
    documents = OpenAIDocumentEmbedder(**stack, raise_on_failure=True)
    bad = openai.BadRequestError
    tei = InferenceClient(url)
    for error, call in (
        (bad, lambda: client.embeddings.create(model="model", input=[LONG])),
        (bad, lambda: chain.embed_documents([LONG])),
        (bad, lambda: OpenAILikeEmbedding(**like).get_text_embedding(LONG)),
        (bad, lambda: OpenAITextEmbedder(**stack).run(LONG)),
        (bad, lambda: documents.run([haystack.Document(content=LONG)])),
        (litellm.BadRequestError,
         lambda: litellm.embedding("openai/model", [LONG], api_base=v1["base_url"], api_key="x")),
    ):
        with pytest.raises(error) as raised:
            call()
        assert said in str(raised.value)
    # The default, against which the page warns.
    [none] = OpenAIDocumentEmbedder(**stack).run([haystack.Document(content=LONG)])["documents"]
    assert none.embedding is None
    with pytest.raises(HfHubHTTPError) as raised:
        tei.feature_extraction(LONG, truncate=False)
    assert words("/embed", {"inputs": LONG, "truncate": False}) in str(raised.value)
    with pytest.raises(ollama.ResponseError) as raised:
        ollama.Client(host=url).embed("model", LONG, truncate=False)
    body = {"model": "model", "input": LONG, "truncate": False}
    assert raised.value.error == words("/api/embed", body)
    # An unknown model: LlamaIndex's default is one of OpenAI's.
    with pytest.raises(openai.NotFoundError, match="text-embedding-ada-002.*model"):
        OpenAIEmbedding(api_base=url + "/v1", api_key="none").get_text_embedding("x")
    with pytest.raises(ollama.ResponseError, match="nomic-embed-text"):
        ollama.Client(host=url).embed("nomic-embed-text", "x")


def test_clients_that_do_not_look_at_the_status_fail_all_the_same(url):
    texts = [LONG, *MORE]
    with pytest.raises(ValueError, match="'error'"):
        HuggingFaceEmbeddingServer(url=url + "/embed")(texts)
    index = TextEmbeddingsInference(model_name="model", base_url=url, truncate_text=False)
    with pytest.raises(ValueError, match="error"):
        index.get_text_embedding_batch(texts)
    with pytest.raises(KeyError):
        index.get_query_embedding(LONG)


def test_keys(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    with server("--api-key-file", keys, model=str(DEMO)) as locked:
        url = f"http://127.0.0.1:{locked.port}"
        one = vectors_of(MORE[:1])

        def all_with(key):
            """Yields (the client's exception, a call)."""
            v1 = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
            yield openai.AuthenticationError, lambda: [
                v1.embeddings.create(model="demo", input=MORE[0]).data[0].embedding
            ]
            tei = InferenceClient(url, token=key)
            yield HfHubHTTPError, lambda: tei.feature_extraction(MORE[0])
            bearer = ollama.Client(host=url, headers={"Authorization": f"Bearer {key}"})
            yield ollama.ResponseError, lambda: bearer.embed("demo", MORE[0]).embeddings
            index = TextEmbeddingsInference(model_name="demo", base_url=url, auth_token=key)
            yield KeyError, lambda: [index.get_query_embedding(MORE[0])]

        for error, call in all_with("abracadabra"):
            with pytest.raises(error):
                call()
        for _, call in all_with("open sesame"):
            same(call(), one)


def test_long_texts_are_cut_where_the_clients_api_says_so(url):
    few = ollama.Client(host=url).embed("model", LONG, options={"num_ctx": 10}).embeddings[0]
    same(few, vectors_of([LONG], "--truncate", "--max-tokens", "10")[0])
    cut = vectors_of([LONG], "--truncate")[0]
    same(ollama.Client(host=url).embed("model", LONG).embeddings[0], cut)
    same(TextEmbeddingsInference(model_name="model", base_url=url).get_text_embedding(LONG), cut)
    same(InferenceClient(url).feature_extraction(LONG, truncate=True)[0], cut)


# ---- Prometheus and the dashboard ----------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus(s, tmp_path_factory):
    """Prometheus that scrapes the server every second; yields its address."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "config.yml").write_text(json.dumps({  # JSON is YAML
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{
            "job_name": "qemb", "static_configs": [{"targets": [f"127.0.0.1:{s.port}"]}],
        }],
    }))
    port = helpers.free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/config.yml", f"--storage.tsdb.path={folder}/db",
             f"--web.listen-address=127.0.0.1:{port}"], stderr=log, stdout=log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(GUARD)


def ask(prometheus, expression):
    """The samples that an instant query gives, or None while Prometheus starts."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=GUARD) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as e:
        if e.code == 503:
            return None
        raise AssertionError(f"{expression}: {e.read().decode()}") from e
    except urllib.error.URLError:
        return None


def lost(mine, theirs, place=""):
    """Yields the places of mine, JSON, that differ in theirs. Theirs may have more keys."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in mine:
            yield from lost(mine[key], theirs.get(key, "nothing"), f"{place}/{key}")
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for i, (a, b) in enumerate(zip(mine, theirs)):
            yield from lost(a, b, f"{place}/{i}")
    elif mine != theirs:
        yield f"{place}: {mine} became {theirs}"


def test_grafanas_types_hold_the_whole_dashboard():
    register_default_plugins()  # the types of the panels and of Prometheus' queries
    dashboard = json.loads(DASHBOARD.read_text())
    encoder = JSONEncoder(sort_keys=True)
    theirs = json.loads(encoder.encode(grafana.Dashboard.from_json(dashboard)))
    assert not list(lost(dashboard, theirs))


def test_prometheus_answers_every_panel(s, prometheus):
    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]
    until = time.monotonic() + GUARD
    while not [x for x in ask(prometheus, "rate(qemb_texts_total[1m])") or []
               if float(x["value"][1]) > 0]:
        assert time.monotonic() < until, "no rate of texts"
        assert s.post({"model": "model", "input": f"text {time.monotonic()}"}).status == 200
        time.sleep(0.2)
    for p in panels:
        for t in p["targets"]:
            e = t["expr"].replace("$__rate_interval", "1m").replace("$job", ".*")
            got = ask(prometheus, e.replace("$instance", ".*"))
            # A status that no answer has had gives no line.
            assert got or 'code="' in e or 'code=~"' in e, f"{p['title']}: {e}"
            shown = re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])
            for sample in got:
                assert set(shown) <= set(sample["metric"]), p["title"]
