// The same in TypeScript, with the generated types and their fetch client alone: node use_types.js URL
import createClient from "openapi-fetch";
import type { components, paths } from "./types.js";

type Job = components["schemas"]["Job"];
const client = createClient<paths>({ baseUrl: process.argv[2] });

function check(true_: unknown, what: unknown): asserts true_ {
  if (!true_) throw new Error(JSON.stringify(what));
}

const body: components["schemas"]["GenerationSubmission"] = {
  kind: "generation",
  spec: { subjects: 4, seed: 7, min_accuracy: 0, training: { steps: 5 } },
};
const submitted = await client.POST("/v1/jobs", { body });
check(submitted.data && "id" in submitted.data, submitted);
let job: Job = submitted.data;
const deadline = Date.now() + 60000;
while (!["SUCCEEDED", "FAILED", "CANCELLED"].includes(job.state)) {
  check(Date.now() < deadline, job);
  await new Promise((done) => setTimeout(done, 100));
  const found = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: job.id } } });
  check(found.data, found);
  job = found.data;
}
check(job.state === "SUCCEEDED", job);
const params = { path: { job_id: job.id } };
const events = await client.GET("/v1/jobs/{job_id}/events", { params, parseAs: "text" });
check(events.data?.includes("event: end"), events);

const made = await client.GET("/v1/artifacts", { params: { query: { job: job.id } } });
const zoo = made.data?.items.find((item) => item.name === "zoo");
check(zoo, made);
const detail = await client.GET("/v1/artifacts/{artifact_id}", { params: { path: { artifact_id: zoo.id } } });
const [path, file] = Object.entries(detail.data?.manifest.files ?? {})[0];
const content = await client.GET("/v1/artifacts/{artifact_id}/files/{path}", {
  params: { path: { artifact_id: zoo.id, path } },
  parseAs: "arrayBuffer",
});
check(content.data?.byteLength === file.size, content);

const jobs: components["schemas"]["Pipeline"]["jobs"] = {
  zoo: { kind: "generation", spec: { subjects: 4 }, queue: "nobody" },
  codec: { kind: "crossmodal", spec: { zoo: { job: "zoo", artifact: "zoo" } }, queue: "nobody" },
};
const pipeline = await client.POST("/v1/pipelines", { body: { jobs } });
check(pipeline.data, pipeline);
// A job whose input is cancelled fails, so the one that waits comes first.
for (const name of ["codec", "zoo"]) {
  const path = { job_id: pipeline.data.jobs[name].id };
  const cancelled = await client.POST("/v1/jobs/{job_id}/cancel", { params: { path } });
  check(cancelled.data?.state === "CANCELLED", cancelled);
}
const wrong = await client.POST("/v1/jobs", { body: { kind: "policy", spec: { nodes: 1 } } });
check(wrong.error?.violations?.[0].field === "spec.nodes", wrong);
