"""A small server that answers as vLLM does, and says what it was asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file

END = 1  # the token that ends a completion
LOAD_ADAPTER, COLLECTIVE_RPC = "/v1/load_lora_adapter", "/collective_rpc"


class Emulator(BaseHTTPRequestHandler):
    """Completion i of a prompt is its last token, then i more and the end; -0.5 each.

    At the other endpoint each token was drawn from it, token 2 and, in completion i, i more.

    Attributes of the server:
        models, info: what /v1/models and /server_info answer.
        key: the API key that requests must have, or None.
        failures: what the next requests get, the last one first: a code and a message, None for a
            closed connection, or a function that is called before the right answer.
        bodies, paths: of the requests for completions.
        routes: the ways in which it takes weights.
        unknown: the status of the answer at another route.
        headers: of each answer.
        refusal: the reason for which it takes no weights, or None.
        loaded: the path and the tensors of each weights that it took.
        resets: how many weights it had taken when its cache was to be dropped, which works the
            second time, or never.
    """

    def do_GET(self):
        if not self.is_allowed():
            return self.answer({"error": "Unauthorized"}, 401)
        self.answer(self.server.info if "server_info" in self.path else self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return self.answer({"error": "Unauthorized"}, 401)
        if self.path in (LOAD_ADAPTER, COLLECTIVE_RPC, "/reset_prefix_cache"):
            return self.take_weights(body)
        self.server.bodies.append(body)
        self.server.paths.append(self.path)
        if self.server.failures:
            failure = self.server.failures.pop()
            if failure is None:
                self.close_connection = True
                return
            if callable(failure):
                failure()
            else:
                code, message = failure
                return self.answer({"error": {"message": message, "code": code}}, code)
        if self.path == "/inference/v1/generate":
            sampling = body["sampling_params"] | {"prompt": body["token_ids"]}
            choices = [self.choice_with_mask(sampling, i) for i in range(sampling["n"])]
        else:
            choices = [self.choice(body, i) for i in range(body["n"])]
        self.answer({"choices": [self.server.change(each) for each in reversed(choices)]})

    def is_allowed(self):
        return self.server.key in (None, self.headers.get("Authorization", "").partition(" ")[2])

    def take_weights(self, body):
        if self.path == "/reset_prefix_cache":
            self.server.resets.append(len(self.server.loaded))
            return self.answer(
                {"success": self.server.resets_work and len(self.server.resets) % 2 == 0}
            )
        if self.path not in self.server.routes:
            return self.answer({"detail": "Not Found"}, self.server.unknown)
        if not body:
            return self.answer({"error": {"message": "a field is missing"}}, 400)
        if self.server.refusal:
            return self.answer({"error": {"message": self.server.refusal}}, 500)
        if self.path == LOAD_ADAPTER:
            path, name = Path(body["lora_path"]), body["lora_name"]
            self.server.adapters = {name}
        else:
            assert body["method"] == "reload_weights"
            path = Path(body["kwargs"]["weights_path"])
        (file,) = path.glob("*.safetensors")
        self.server.loaded.append((path, load_file(file)))
        self.answer({"results": [None]})

    def choice(self, body, i):
        ids = [body["prompt"][-1]] * (i + 1) + [END]
        reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        logprobs = {
            "tokens": [f"token_id:{each}" for each in ids],
            "token_logprobs": [-0.5 - i] * len(ids),
            "top_logprobs": [{f"token_id:{each}": -0.5 - i} for each in ids],
        }
        return {"index": i, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}

    def choice_with_mask(self, sampling, i):
        choice = self.choice(sampling, i)
        ids = choice["token_ids"]
        mask = [[2, *range(10, 10 + i), token] for token in ids]
        content = [{"token_id": token, "logprob": -0.5 - i, "rank": 1} for token in ids]
        return choice | {"logprobs": {"content": content}, "sampling_mask": mask}

    def answer(self, content, code=200):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        for header in ({"Content-Length": str(len(data))} | self.server.headers).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def emulate():
    """Yield a server; it takes weights in both ways."""
    emulated = ThreadingHTTPServer(("127.0.0.1", 0), Emulator)
    emulated.models = {"data": [{"id": "served"}, {"id": "an adapter"}]}
    config = {"device_config": {"device": "cuda"}, "model_config": {"dtype": "torch.bfloat16"}}
    emulated.info = {"vllm_config": config}
    emulated.bodies, emulated.paths, emulated.failures = [], [], []
    emulated.loaded, emulated.resets = [], []
    emulated.routes, emulated.adapters = {LOAD_ADAPTER, COLLECTIVE_RPC}, set()
    emulated.key = emulated.refusal = None
    emulated.unknown, emulated.headers = 404, {}
    emulated.resets_work = True
    emulated.change = lambda choice: choice
    threading.Thread(target=emulated.serve_forever, args=[0.01], daemon=True).start()
    emulated.url = f"http://127.0.0.1:{emulated.server_port}"
    yield emulated
    emulated.shutdown()
    emulated.server_close()
