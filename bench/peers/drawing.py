"""What the peers' handlers do: requests in, PNG files out. Weights, scheduler, dtype and codec are ours."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from app.images import encode
from app.schemas import Parameters
from bench.peers.plan import Plan
from models import samplers
from models.catalog import Catalog
from models.families import FAMILIES
from models.loading import load_parts, load_pipeline
from models.prepare import decided
from models.program import Inputs, generator
from workers.curve import warm_up
from workers.engine import Engine
from workers.graphs import Graphs
from workers.passes import Eager

Request = dict[str, Any]
Draw = Callable[[list[Request]], list[bytes]]


def drawing(plan: Plan) -> Draw:
    torch.set_num_threads(plan.threads or torch.get_num_threads())
    torch.set_grad_enabled(False)
    return (OurNets if plan.net else Stock)(catalog_of(plan), plan.device)


def catalog_of(plan: Plan) -> Catalog:
    """Its cards in the precision that the service draws in: who computes in another is not compared."""
    return Catalog(decided(card, plan.device, plan.dtype) for card in plan.catalog)


class Stock:
    """diffusers' pipelines as their users call them. A batch takes one call for each group of the same kind."""

    def __init__(self, catalog: Catalog, device: str):
        self.pipelines = {card.name: load_pipeline(card, device) for card in catalog}
        self.schedulers = {name: samplers.frozen_config(p.scheduler) for name, p in self.pipelines.items()}

    def __call__(self, requests: list[Request]) -> list[bytes]:
        groups, files = defaultdict[Any, list[int]](list), [b""] * len(requests)
        for i, r in enumerate(requests):
            kind = ("model", "num_inference_steps", "guidance_scale", "width", "height", "scheduler")
            groups[tuple(r[field] for field in kind)].append(i)
        for (model, steps, guidance, width, height, scheduler), members in groups.items():
            pipeline = self.pipelines[model]
            pipeline.scheduler = samplers.scheduler(scheduler, self.schedulers[model])
            pictures = pipeline(
                [requests[i]["prompt"] for i in members],
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=[generator(requests[i]["seed"]) for i in members],
                output_type="pil",
            ).images
            for i, picture in zip(members, pictures, strict=True):
                files[i] = encode(picture, "png", "")
        return files


class OurNets:
    """The service's programs and passes for one batch, which nobody joins: what is left is scheduling."""

    def __init__(self, catalog: Catalog, device: str):
        self.residents = {
            card.name: FAMILIES[card.family](card, load_pipeline(card, device), load_parts(card, device))
            for card in catalog
        }
        self.runner = Graphs() if device.startswith("cuda") else Eager(torch.device(device))
        for resident in self.residents.values():
            warm_up(resident, resident.card.max_rows, self.runner)

    def __call__(self, requests: list[Request]) -> list[bytes]:
        engine = Engine(runner=self.runner)
        tickets = [engine.submit(self.program(request)) for request in requests]
        while engine:
            engine.step()
        return [encode(picture(ticket), "png", "") for ticket in tickets]

    def program(self, request: Request) -> Any:
        r = Parameters.model_validate({"task": "text-to-image", **request})
        return self.residents[r.model].draw(r, r.seed, Inputs())


def picture(ticket: Any) -> Any:
    if ticket.error:
        raise ticket.error
    return (ticket.result.movedim(-3, -1) * 255).round().byte().cpu().numpy()
