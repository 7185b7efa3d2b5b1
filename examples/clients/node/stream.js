// node stream.js HOST:PORT a.jpg b.jpg …: explains each picture on one stream, and prints answers as they come.
import { once } from 'node:events';
import { readFileSync, writeFileSync } from 'node:fs';
import { connect } from './sidelight.js';

const [address, ...paths] = process.argv.slice(2);
const client = connect(address);
const stream = client.AttributeStream();
const unanswered = new Set(paths);

stream.on('data', ({ id, result, failure }) => {
  unanswered.delete(id);
  const failed = failure ?? result.failures[0]; // of the batch, or of its one example
  if (failed) {
    console.error(`${id}: ${failed.code} ${failed.message}`);
    process.exitCode = 1;
    return;
  }
  const { prediction } = result.examples[0];
  console.log(`${id} ${prediction.label} ${prediction.probability.toFixed(4)}`);
  writeFileSync(`${id}.f32`, result.maps.data);
});
stream.on('error', (error) => {
  console.error(`${error.code} ${error.details}`);
  process.exitCode = 1;
});
// The server may end the stream itself. What it has not answered belongs on a new one.
stream.on('close', () => {
  client.close();
  if (unanswered.size) process.exitCode = 1;
  for (const path of unanswered) console.error(`${path}: not answered`);
});

for (const path of unanswered) {
  const attribute = {
    id: path,
    images: { encoded: { files: [readFileSync(path)] } },
    target: { predicted: {} },
    method: { gradient: {} },
  };
  if (!stream.write({ attribute })) await once(stream, 'drain'); // the server is full: it reads on when it can
}
stream.end();
