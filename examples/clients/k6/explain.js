import grpc from 'k6/net/grpc';
import encoding from 'k6/encoding';
import { check } from 'k6';

const picture = encoding.b64encode(open('cat.jpg', 'b'));
const client = new grpc.Client();

export default () => {
  if (__ITER === 0) client.connect('127.0.0.1:50051', { plaintext: true, reflect: true });
  const answer = client.invoke('sidelight.v1.AttributionService/Attribute', {
    images: { encoded: { files: [picture] } },
    target: { predicted: {} },
    method: { gradient: {} },
  });
  check(answer, { 'the status is OK': ({ status }) => status === grpc.StatusOK });
};
