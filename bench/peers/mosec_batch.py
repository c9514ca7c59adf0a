"""mosec, which gathers batches in Rust."""

import sys

from mosec import Server, Worker

from bench.peers.drawing import drawing
from bench.peers.plan import Plan


class Pictures(Worker):
    resp_mime_type = "image/png"

    def __init__(self):
        self.draw = drawing(Plan.read())

    def forward(self, data):
        return self.draw(data)

    def serialize(self, data):
        return data


if __name__ == "__main__":
    plan = Plan.read()
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(plan.port), "--timeout", "900000", "--log-level", "warning"]
    server = Server()
    wait = max(1, round(1000 * plan.wait))
    server.append_worker(Pictures, num=1, max_batch_size=plan.batch, max_wait_time=wait, timeout=900, route="/predict")
    server.run()
