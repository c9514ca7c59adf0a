"""LitServe, which gathers batches."""

import litserve
from fastapi import Response

from bench.peers.drawing import drawing
from bench.peers.plan import Plan


class Pictures(litserve.LitAPI):
    def setup(self, device):
        self.draw = drawing(Plan.read())

    def decode_request(self, request):
        return request

    def batch(self, inputs):
        return inputs

    def predict(self, inputs):
        return self.draw(inputs)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    plan = Plan.read()
    api = Pictures(max_batch_size=plan.batch, batch_timeout=plan.wait)
    server = litserve.LitServer(api, accelerator=plan.device, devices=1, timeout=900)
    server.run(host="127.0.0.1", port=plan.port, generate_client_file=False, log_level="warning")
