"""A client of KServe, as its users write it: explains one batch with arrays, then with lists. Imports no Sidelight.

Called as `kserve_client.py ADDRESS FOLDER`; the folder has `images.npy`.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

PARAMETERS = {"sidelight_method": "integrated_gradients(steps=8)"}


async def main(address: str, folder: Path) -> None:
    images = np.load(folder / "images.npy")
    as_array = InferInput("images", list(images.shape), "UINT8")
    as_array.set_data_from_numpy(images, binary_data=True)
    as_list = InferInput("images", list(images.shape), "UINT8", data=images.flatten().tolist())
    async with InferenceGRPCClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("small")
        maps = []
        for given in (as_array, as_list):
            request = InferRequest("small", [given], request_id="mine", parameters=PARAMETERS)
            response = await client.infer(request)
            assert response.id == "mine"
            maps.append(next(each for each in response.outputs if each.name == "maps").as_numpy())
    np.savez(folder / "found.npz", array=maps[0], list=maps[1])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
