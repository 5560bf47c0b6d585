// A row of the table for every id. Ids are checked on upload; the clamp keeps a defect from reading elsewhere.
{# Inside: `cell` keeps row and col inside the result; one id for each row; the table is read at a clamped id and col < used, its own columns. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    var v = vec4<f32>();
    if (col < {{ used }}u) {
        v = table_load(min(ids_at(row), {{ vocabulary - 1 }}u) * table_stride + col);
    }
    finish(row, col, v);
}
