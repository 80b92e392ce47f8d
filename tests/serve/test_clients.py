"""The clients that people use, as they are on PyPI, against a server of its own process."""

import numpy as np
import pytest

from tests.serve.asking import ask
from tests.serve.conftest import Server

TEXTS = ["the king of music", "a great film", "water"]


@pytest.fixture(scope="module")
def server(folders):
    names = [f"{name}={folder}" for name, folder in folders.items()]
    with Server(*names, PRUNEOFA_API_KEY="secret") as started:
        yield started


@pytest.fixture(scope="module")
def vectors(models):
    rows = models["vectors"].engine.predict(TEXTS)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def _hub_may_call_this_machine(monkeypatch):
    """The tests run offline; huggingface_hub would then call no server at all."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def same(found, expected):
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-6)


def test_huggingface_hub(server, models, vectors):
    hub = pytest.importorskip("huggingface_hub")

    def client(model):
        return hub.InferenceClient(f"{server.url}/models/{model}/{paths[model]}", token="secret")

    paths = {"vectors": "embed", "topics": "predict", "entities": "classify_tokens", "answers": "answer"}
    paths["words"] = "fill_mask"
    same(client("vectors").feature_extraction(TEXTS[0])[0], vectors[0])
    same(client("vectors").feature_extraction(TEXTS, normalize=True, truncate=True), vectors)
    # As from text-embeddings-inference: the client takes the first element, which is the best label.
    assert client("topics").text_classification(TEXTS[0]).label == models["topics"].engine.predict(TEXTS[0])["label"]
    found = client("topics").text_classification(TEXTS[0], function_to_apply="none", top_k=1)
    raw = ask(server, "/models/topics/predict", "secret", inputs=TEXTS[0], raw_scores=True)[1]
    assert (found.label, found.score) == (raw[0]["label"], pytest.approx(raw[0]["score"], abs=1e-6))
    found = client("entities").token_classification(TEXTS[0], aggregation_strategy="simple", ignore_labels=[])
    assert [TEXTS[0][one.start : one.end] for one in found] == [one.word for one in found] != []
    found = client("answers").question_answering(question="who", context=TEXTS[0])
    assert found.answer == models["answers"].engine.predict({"question": "who", "context": TEXTS[0]})["answer"]
    assert client("words").fill_mask("the [MASK]")[0].token_str
    similar = hub.InferenceClient(f"{server.url}/similarity", token="secret")
    same(similar.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:]), vectors[1:] @ vectors[0])
    with pytest.raises(Exception, match="401"):
        hub.InferenceClient(f"{server.url}/embed", token="wrong").feature_extraction("a")


def test_openai(server, vectors):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    assert next(iter(client.models.list())).id == "vectors"
    found = client.embeddings.create(model="vectors", input=TEXTS)  # base64 by default
    same([row.embedding for row in found.data], vectors)
    assert found.usage.prompt_tokens == 14
    found = client.embeddings.create(model="vectors", input=TEXTS, encoding_format="float", dimensions=4)
    same([row.embedding for row in found.data], vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True))
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions"):
        client.embeddings.create(model="vectors", input="a", dimensions=1000)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model="vectors", input="a")


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_cohere(server, models, version):
    cohere = pytest.importorskip("cohere")
    client = getattr(cohere, version)(api_key="secret", base_url=server.url)
    scores = [models["ranks"].engine.predict(("who", text))["score"] for text in TEXTS]
    found = client.rerank(model="ranks", query="who", documents=TEXTS, top_n=2)
    assert [row.index for row in found.results] == list(np.argsort([-score for score in scores])[:2])
    assert found.results[0].relevance_score == pytest.approx(max(scores), abs=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(server, vectors, models, binary):
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    headers = {"authorization": "Bearer secret"}
    assert client.is_server_live(headers) and client.is_server_ready(headers)
    assert client.is_model_ready("vectors", headers=headers)
    assert client.get_model_metadata("topics", headers=headers)["outputs"][0]["name"] == "scores"
    tensor = triton.InferInput("text", [len(TEXTS)], "BYTES")
    tensor.set_data_from_numpy(np.array(TEXTS, object), binary_data=binary)
    found = client.infer("vectors", [tensor], headers=headers)
    same(found.as_numpy("embedding"), vectors)
    wanted = [triton.InferRequestedOutput("label", binary_data=binary)]
    found = client.infer("topics", [tensor], outputs=wanted, headers=headers).as_numpy("label")
    labels = [label.decode() if isinstance(label, bytes) else label for label in found.tolist()]
    assert labels == [row["label"] for row in models["topics"].engine.predict(TEXTS)]
    with pytest.raises(Exception, match="no such model"):
        client.infer("none", [tensor], headers=headers)


def test_langchain(server, vectors):
    langchain = pytest.importorskip("langchain_openai")
    client = langchain.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="secret", model="vectors", check_embedding_ctx_length=False
    )
    same(client.embed_documents(TEXTS * 11), np.tile(vectors, (11, 1)))  # 33 at once
    same(client.embed_query(TEXTS[0]), vectors[0])


def test_llama_index(server, vectors, models):
    embeddings = pytest.importorskip("llama_index.embeddings.text_embeddings_inference")
    tei_rerank = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    client = embeddings.TextEmbeddingsInference("vectors", base_url=server.url, auth_token="secret")
    same(client.get_text_embedding_batch(TEXTS), vectors)
    ranker = tei_rerank.TextEmbeddingInference(top_n=2, base_url=server.url, auth_token="Bearer secret")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    found = ranker.postprocess_nodes(nodes, query_str="who")
    scores = [models["ranks"].engine.predict(("who", text))["score"] for text in TEXTS]
    assert [node.text for node in found] == [TEXTS[index] for index in np.argsort([-score for score in scores])[:2]]


def test_haystack(server, vectors, models):
    embedders = pytest.importorskip("haystack_integrations.components.embedders.huggingface_api")
    rankers = pytest.importorskip("haystack_integrations.components.rankers.huggingface_api")
    from haystack import Document
    from haystack.utils import Secret

    key = Secret.from_token("secret")
    where = {
        "api_type": "text_embeddings_inference",
        "api_params": {"url": f"{server.url}/embed"},
        "token": key,
        "normalize": True,
    }
    same(embedders.HuggingFaceAPITextEmbedder(**where).run(text=TEXTS[0])["embedding"], vectors[0])
    documents = [Document(content=text) for text in TEXTS]
    found = embedders.HuggingFaceAPIDocumentEmbedder(**where).run(documents=documents)["documents"]
    same([document.embedding for document in found], vectors)
    ranker = rankers.HuggingFaceTEIRanker(url=server.url, top_k=2, token=key)
    found = ranker.run(query="who", documents=documents)["documents"]
    scores = [models["ranks"].engine.predict(("who", text))["score"] for text in TEXTS]
    assert [document.content for document in found] == [TEXTS[i] for i in np.argsort([-score for score in scores])[:2]]
