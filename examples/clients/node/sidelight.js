// The service's stub, made from the schema when the program starts.
import { fileURLToPath } from 'node:url';
import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';

const MAX_MESSAGE_BYTES = 64 * 1024 * 1024; // by default, clients receive 4 MiB

const schema = loadSync('sidelight/v1/attribution.proto', {
  includeDirs: [fileURLToPath(new URL('../../../proto', import.meta.url))],
  keepCase: true,
  longs: Number,
  defaults: true, // an empty field is its default, not missing
});
const { AttributionService } = grpc.loadPackageDefinition(schema).sidelight.v1;

export const connect = (address) =>
  new AttributionService(address, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
  });
