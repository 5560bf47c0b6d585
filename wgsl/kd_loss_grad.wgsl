{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var dy = vec4<f32>();
    if (col < {{ used }}u) {
        let y = y_load(row * y_stride + col);
        let t = t_load(row * t_stride + col);
        let r = rows_load(row * rows_stride);
        // A norm at its lower bound is constant: only what the dot product contributes is left.
        let along = select(0.0, r.x / (r.y * r.z), r.y > 1e-6);
        let cosine = (t / r.z - along * (y / r.y)) / r.y;
        dy = dloss_at(0u) * ({{ beta }} * 2.0 / {{ elements }}.0 * (y - t) - {{ alpha }} / {{ rows }}.0 * cosine);
    }
    finish(row, col, dy);
}
