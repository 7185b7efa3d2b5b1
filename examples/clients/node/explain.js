// node explain.js HOST:PORT picture.jpg: prints class and probability; writes picture.jpg.f32 and picture.jpg.png.
import { readFileSync, writeFileSync } from 'node:fs';
import { connect } from './sidelight.js';

const [address, path] = process.argv.slice(2);
const client = connect(address);
const request = {
  images: { encoded: { files: [readFileSync(path)] } },
  target: { predicted: {} },
  method: { gradient: {} },
  output: { rendered: {} }, // a PNG image of the map over the picture
};
client.Attribute(request, { deadline: Date.now() + 60_000 }, (error, answer) => {
  client.close();
  if (error) throw error; // its code and details: docs/reference/errors.md
  const { examples, failures, maps } = answer.result;
  for (const { code, message } of failures) {
    console.error(`${path}: ${code} ${message}`);
    process.exitCode = 1;
  }
  if (failures.length) return;
  const { prediction, rendered } = examples[0];
  console.log(`${path} ${prediction.label} ${prediction.probability.toFixed(4)}`);
  writeFileSync(`${path}.f32`, maps.data); // maps.shape float32, little-endian
  writeFileSync(`${path}.png`, rendered[0]);
});
