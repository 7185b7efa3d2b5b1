"""A client of Triton, as its users write it: explains a batch in each way and saves the maps. Imports no Sidelight.

Called as `triton_client.py ADDRESS FOLDER [TOKEN] [CA]`; the folder has `images.npy` and pictures `*.png`.
"""

import asyncio
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.utils.shared_memory as shm

TIMEOUT_S = 60.0
PARAMETERS = {"sidelight_method": "integrated_gradients(steps=8)"}
OUTPUTS = [triton.InferRequestedOutput(name) for name in ("maps", "predicted", "failures")]
N_STREAMED = 6


def main(address: str, folder: Path, token: str, authority: str) -> None:
    options = {"ssl": bool(authority), "root_certificates": authority or None}
    headers = {"authorization": f"Bearer {token}"} if token else None
    images = np.load(folder / "images.npy")
    files = np.array([path.read_bytes() for path in sorted(folder.glob("*.png"))], np.object_)
    with triton.InferenceServerClient(address, **options) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("small")
        assert client.get_server_metadata(headers=headers).name == "sidelight"
        assert client.get_model_metadata("small", headers=headers).inputs[0].name == "images"
        assert client.get_model_config("small", headers=headers).config.max_batch_size
        assert client.get_model_repository_index(headers=headers).models[0].state == "READY"
        found = {
            "unary": infer(client, tensor(images), headers),
            "files": infer(client, tensor(files), headers),
            "stream": streamed(client, images, headers),
            "shared": through_shared_memory(client, images, headers),
        }
        assert client.get_inference_statistics("small", headers=headers).model_stats[0].inference_count
    found["aio"] = asyncio.run(asynchronous(address, images, headers, options))
    np.savez(folder / "found.npz", **found)


def tensor(array: np.ndarray) -> triton.InferInput:
    given = triton.InferInput("images", array.shape, {"O": "BYTES", "u": "UINT8"}[array.dtype.kind])
    given.set_data_from_numpy(array)
    return given


def infer(client: triton.InferenceServerClient, given: triton.InferInput, headers: object) -> np.ndarray:
    result = client.infer("small", [given], outputs=OUTPUTS, request_id="mine", parameters=PARAMETERS, headers=headers)
    assert result.get_response().id == "mine"
    assert not any(result.as_numpy("failures"))
    assert (result.as_numpy("predicted") >= 0).all()
    return result.as_numpy("maps")


def streamed(client: triton.InferenceServerClient, images: np.ndarray, headers: object) -> np.ndarray:
    """Send one image after the other, with a wrong request among them."""
    answers: queue.SimpleQueue[tuple[object, object]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
    for n in range(N_STREAMED):
        parameters = PARAMETERS | ({"sidelight_score": "none"} if n == 2 else {})
        image = tensor(images[n % 2 :][:1])
        client.async_stream_infer("small", [image], request_id=str(n), parameters=parameters)
    maps = []
    for n in range(N_STREAMED):
        result, error = answers.get(timeout=TIMEOUT_S)
        if n == 2:
            assert "sidelight_score" in str(error)
            continue
        assert error is None
        assert result.get_response().id == str(n)
        maps.append(result.as_numpy("maps"))
    client.stop_stream()
    return np.concatenate(maps[:2])


def through_shared_memory(client: triton.InferenceServerClient, images: np.ndarray, headers: object) -> np.ndarray:
    n, height, width = len(images), 32, 32
    n_bytes = n * height * width * 4
    given, maps = shm.create_shared_memory_region("in", "/triton_in", images.nbytes), None
    try:
        maps = shm.create_shared_memory_region("out", "/triton_out", n_bytes)
        shm.set_shared_memory_region(given, [images])
        client.register_system_shared_memory("in", "/triton_in", images.nbytes, headers=headers)
        client.register_system_shared_memory("out", "/triton_out", n_bytes, headers=headers)
        assert len(client.get_system_shared_memory_status(headers=headers).regions) == 2
        image = triton.InferInput("images", images.shape, "UINT8")
        image.set_shared_memory("in", images.nbytes)
        output = triton.InferRequestedOutput("maps")
        output.set_shared_memory("out", n_bytes)
        client.infer("small", [image], outputs=[output], parameters=PARAMETERS, headers=headers)
        found = shm.get_contents_as_numpy(maps, np.float32, (n, height, width)).copy()
        client.unregister_system_shared_memory(headers=headers)
        assert not client.get_system_shared_memory_status(headers=headers).regions
        return found
    finally:
        for region in filter(None, (given, maps)):
            shm.destroy_shared_memory_region(region)


async def asynchronous(address: str, images: np.ndarray, headers: object, options: dict[str, object]) -> np.ndarray:
    async with triton_aio.InferenceServerClient(address, **options) as client:
        assert await client.is_server_ready()

        async def requests() -> object:
            for each in images:
                yield {"model_name": "small", "inputs": [tensor(each[None])], "parameters": PARAMETERS}

        maps = []
        async for result, error in client.stream_infer(requests(), headers=headers):
            assert error is None
            maps.append(result.as_numpy("maps"))
        whole = await client.infer("small", [tensor(images)], parameters=PARAMETERS, headers=headers)
        assert len(maps) == len(images)
        return whole.as_numpy("maps")


if __name__ == "__main__":
    address, folder, token, authority = (*sys.argv[1:], "", "")[:4]
    main(address, Path(folder), token, authority)
